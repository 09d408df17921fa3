-- wrk script: single writes of a 512-byte JSON payload. WALFLOW_NS names the namespace; with WALFLOW_NS_COUNT=N the
-- writes go evenly to WALFLOW_NS-0 … WALFLOW_NS-(N-1).
local namespace = os.getenv("WALFLOW_NS") or "bench"
local count = tonumber(os.getenv("WALFLOW_NS_COUNT") or "0")
local filler = string.rep("x", 512 - 31)
local payload = '{"operation":"SET","value":"' .. filler .. '"}'
local bodies = {}
local function body(ns) return '{"namespace":"' .. ns .. '","payload":' .. payload .. '}' end
local at = 0
function init()
  if count > 0 then
    for i = 1, count do
      bodies[i] = wrk.format("POST", "/api/v1/wal/write", { ["Content-Type"] = "application/json" }, body(namespace .. "-" .. (i - 1)))
    end
  else
    bodies[1] = wrk.format("POST", "/api/v1/wal/write", { ["Content-Type"] = "application/json" }, body(namespace))
  end
end
function request()
  at = at % #bodies + 1
  return bodies[at]
end

function done(summary, latency)
  io.write(string.format("RESULT rate=%.0f p50_ms=%.2f p99_ms=%.2f errors=%d\n", summary.requests / summary.duration * 1e6,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000,
    summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.timeout))
end
