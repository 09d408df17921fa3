#!/usr/bin/env bash
# Single writes side by side: a bare warp echo, the log in memory, the embedded log, delivery to an HTTP sink, 100 namespaces.
# usage: benches/run.sh [SECONDS] [ROUNDS]      needs wrk and curl; prints one line a measurement
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-20} rounds=${2:-2}
cargo build --release --quiet
peer=$(cargo bench --bench peer --no-run 2>&1 | sed -n 's/.*Executable.*(\(.*\))/\1/p')
walflow=$PWD/target/release/walflow
work=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait 2>/dev/null; rm -rf "$work"' EXIT
mkdir "$work/pipelines"
cp benches/pipelines/*.yaml "$work/pipelines"
for i in $(seq 0 99); do
  printf 'namespace: many-%s\nsink: { stdout: {} }\n' "$i" > "$work/pipelines/many-$i.yaml"
done
base=${BASE_PORT:-4000} echo_port=$((base + 1)) sink_port=$((base + 2))
export SINK_PORT=$sink_port
"$peer" echo "$echo_port" & "$peer" sink "$sink_port" &
"$walflow" run "$work/pipelines" --data "$work/data" --listen "127.0.0.1:$base" > /dev/null 2> "$work/log" &
ready() { for _ in $(seq 200); do curl -sf "$1" > /dev/null && return; sleep 0.05; done; echo "not ready: $1" >&2; tail "$work/log" >&2; exit 1; }
ready "http://127.0.0.1:$base/readyz"
for ns in bench bench-memory $(seq -f 'many-%g' 0 99); do
  "$walflow" branch pause "$ns" stdout --url "http://127.0.0.1:$base" > /dev/null 2>&1 || echo "could not pause $ns" >&2
done
load() { # load NAME PORT CONNECTIONS
  wrk -t1 -c"$3" -d"${4:-$seconds}" -s benches/write.lua "http://127.0.0.1:$2" | sed -n "s/^RESULT/$1 c=$3/p"
}
load warm-up "$base" 128 3
for _ in $(seq "$rounds"); do
  for c in 1 32 128; do
    load echo "$echo_port" $c
    WALFLOW_NS=bench-memory load memory "$base" $c
    WALFLOW_NS=bench load embedded "$base" $c
  done
  WALFLOW_NS=many WALFLOW_NS_COUNT=100 load 100-namespaces "$base" 128
  before=$(curl -s "http://127.0.0.1:$sink_port/count")
  WALFLOW_NS=bench-http load delivered "$base" 128
  after=$(curl -s "http://127.0.0.1:$sink_port/count")
  echo "at the sink within those $seconds s: $(((after - before) / seconds))/s"
done
