#!/usr/bin/env python3
"""Many parked records: memory, lateness while others are parked and all are delivered, and a spike.

usage: benches/parked.py WALFLOW PEER [MILLIONS]      (target/release/walflow, the `peer` bench; needs python3 alone)

Prints one line a measurement. The records go in as NDJSON; what falls due is counted at an HTTP sink (`peer sink`).
"""
import http.client, os, re, subprocess, sys, tempfile, threading, time
from datetime import datetime, timezone

walflow, peer = sys.argv[1], sys.argv[2]
millions = float(sys.argv[3]) if len(sys.argv) > 3 else 10
PORT, SINK = int(os.getenv("BASE_PORT", "4100")), int(os.getenv("BASE_PORT", "4100")) + 1
FILLER = "x" * (512 - 31)
PAYLOAD = '{"operation":"SET","value":"' + FILLER + '"}'

FILE = """namespace: parked
source: {{ backlog: {{ size: 100GiB }} }}
delay: {{ max: 48h }}
sink:
  http: {{ url: "http://127.0.0.1:{sink}/in" }}
  batch: {{ records: 200, linger: 5ms }}
"""


def line(lifecycle):
    return '{"namespace":"parked","lifecycle":{%s},"payload":%s}\n' % (lifecycle, PAYLOAD)


def at(seconds):
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def upload(chunks):
    """One NDJSON request; the answers are read and counted beside it."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=600)
    connection.putrequest("POST", "/api/v1/wal/write/batch")
    connection.putheader("Content-Type", "application/x-ndjson")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    counted = [0, 0]

    def read():
        data = connection.sock.makefile("rb")
        for row in data:
            if b'"succeeded"' in row:
                counted[0] += 1
            elif b'"durable"' in row:
                counted[1] += 1
                if counted[1] == 1:
                    print("refused:", row[:300], file=sys.stderr)
            elif row == b"0\r\n":
                return

    reader = threading.Thread(target=read)
    reader.start()
    for chunk in chunks:
        chunk = chunk.encode()
        connection.send(b"%x\r\n" % len(chunk) + chunk + b"\r\n")
    connection.send(b"0\r\n\r\n")
    reader.join()
    connection.close()
    return counted


def get(path, port=PORT):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse().read().decode()
    connection.close()
    return answer


def delivered():
    return int(get("/count", SINK))


def lateness():
    text = get("/metrics")
    found = re.findall(r'walflow_release_lateness_seconds_bucket\{.*?le="([^"]+)"\} (\d+)', text)
    return [(float(le), int(count)) for le, count in found]


def quantile(before, after, q):
    counts = [(le, late - early) for (le, early), (_, late) in zip(before, after)]
    total = counts[-1][1]
    for le, count in counts:
        if count >= q * total:
            return "<= %g s (of %d)" % (le, total)
    return "?"


def memory(pid):
    status = open(f"/proc/{pid}/status").read()
    return "%d MiB, of it own (not file pages) %d MiB" % (
        int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024,
        int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024,
    )


with tempfile.TemporaryDirectory(dir=os.getenv("BENCH_TMP")) as work:
    os.mkdir(f"{work}/pipelines")
    open(f"{work}/pipelines/parked.yaml", "w").write(FILE.format(sink=SINK))
    sink = subprocess.Popen([peer, "sink", str(SINK)])
    log = open(f"{work}/log", "w")
    server = subprocess.Popen(
        [walflow, "run", f"{work}/pipelines", "--data", f"{work}/data", "--listen", f"127.0.0.1:{PORT}"],
        stdout=log, stderr=log)
    try:
        for _ in range(400):
            try:
                if get("/readyz"):
                    break
            except OSError:
                time.sleep(0.05)
        print("idle:", memory(server.pid))

        many = int(millions * 1e6)
        began = time.time()

        def far(count, offset):
            for start in range(0, count, 500):
                yield "".join(line('"delay":%d' % (7200 + (offset + start + i) * 7919 % 72000)) for i in range(500))

        totals = []
        threads = [threading.Thread(target=lambda o=o: totals.append(upload(far(many // 4, o * 1000003)))) for o in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        took = time.time() - began
        parked = sum(t[0] for t in totals)
        print("parked %d (refused %d) in %.0f s: %.0f/s; memory: %s" % (
            parked, sum(t[1] for t in totals), took, parked / took, memory(server.pid)))

        # 1,000/s fall due for a minute, 5,000/s are parked meanwhile.
        first = time.time() + 30
        upload("".join(line('"deliverAt":"%s"' % at(first + (start + i) / 1000)) for i in range(500)) for start in range(0, 60000, 500))
        before, got = lateness(), delivered()
        time.sleep(max(0, first - time.time()))

        def steady():
            begin = time.time()
            for step in range(600):
                yield "".join(line('"delay":%d' % (7200 + step * 7919 % 72000)) for _ in range(500))
                time.sleep(max(0, begin + (step + 1) * 0.1 - time.time()))

        began = time.time()
        while_parked = upload(steady())
        took = time.time() - began
        print("steady: %.0f/s parked; delivered %d of 60000; lateness p50 %s, p99 %s; memory: %s" % (
            while_parked[0] / took, delivered() - got, quantile(before, lateness(), 0.5), quantile(before, lateness(), 0.99), memory(server.pid)))

        # 100,000 in one second.
        got, first = delivered(), time.time() + 40
        upload("".join(line('"deliverAt":"%s"' % at(first + (start + i) / 100000)) for i in range(500)) for start in range(0, 100000, 500))
        time.sleep(max(0, first - time.time()))
        while delivered() - got < 100000 and time.time() < first + 60:
            time.sleep(0.02)
        print("spike of 100000 due in one second: all at the sink %.2f s after the first was due; memory: %s" % (
            time.time() - first, memory(server.pid)))
        print("on disk: %s" % subprocess.run(["du", "-sh", f"{work}/data"], capture_output=True, text=True).stdout.split()[0])
    finally:
        server.kill(); sink.kill()
        if os.getenv("BENCH_LOG"):
            os.system(f"cp {work}/log {os.getenv('BENCH_LOG')}")
