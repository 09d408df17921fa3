#!/usr/bin/env python3
"""The log on a broker beside the embedded one and beside what the broker does without walflow.

usage: benches/brokers.py WALFLOW PEER KAFKA REDIS_PORT [RECORDS]     (needs python3, wrk, redis-benchmark; a Kafka at
KAFKA = host:port and a Redis on 127.0.0.1:REDIS_PORT with appendfsync always; PEER is `cargo bench --bench peer`'s program)
"""
import http.client, json, os, re, subprocess, sys, tempfile, threading, time

walflow, peer, kafka, redis_port = sys.argv[1:5]
records = int(sys.argv[5]) if len(sys.argv) > 5 else 1_000_000
PORT = int(os.getenv("BASE_PORT", "4300"))
RUN = f"bench-{os.getpid()}"
HERE = os.path.dirname(os.path.abspath(__file__))
REDIS = f"redis://127.0.0.1:{redis_port}"


def ask(method, path):
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    connection.request(method, path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def upload(namespace, count):
    """NDJSON over one connection; gives records a second."""
    line = ('{"namespace":"%s","payload":{"operation":"SET","value":"%s"}}\n' % (namespace, "x" * 480)).encode()
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=600)
    connection.putrequest("POST", "/api/v1/wal/write/batch")
    connection.putheader("Content-Type", "application/x-ndjson")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    answers, refused = connection.sock.makefile("rb"), []
    reader = threading.Thread(target=lambda: [
        refused.append(row) for row in iter(answers.readline, b"0\r\n") if row and b'"durable":"failed"' in row])
    reader.start()
    chunk, began = line * 250, time.time()
    for _ in range(count // 250):
        connection.send(b"%x\r\n" % len(chunk) + chunk + b"\r\n")
    connection.send(b"0\r\n\r\n")
    reader.join()
    if refused:
        sys.exit(f"{len(refused)} refused: {refused[0][:300]}")
    return count / (time.time() - began)


def start(folder, name, files):
    pipelines = f"{folder}/{name}"
    os.mkdir(pipelines)
    for namespace, text in files.items():
        with open(f"{pipelines}/{namespace}.yaml", "w") as file:
            file.write(f"namespace: {namespace}\n{text}\n")
    log = open(f"{folder}/{name}.log", "w")
    server = subprocess.Popen(
        [walflow, "run", pipelines, "--data", f"{folder}/{name}-data", "--listen", f"127.0.0.1:{PORT}"], stdout=log, stderr=log)
    deadline = time.time() + 120
    while time.time() < deadline and server.poll() is None:
        try:
            if ask("GET", "/readyz")[0] == 200:
                return server
        except OSError:
            pass
        time.sleep(0.05)
    server.kill()
    sys.exit(open(log.name).read()[-2000:])


def stop(server):
    server.terminate()
    server.wait()


def branch(verb, namespace, name):
    command = [walflow, "branch", verb, namespace, name, "--url", f"http://127.0.0.1:{PORT}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def lag(namespace):
    return json.loads(ask("GET", f"/api/v1/wal/namespace/{namespace}/status")[1])["branches"][0]["lagRecords"]


def resident(server):
    status = open(f"/proc/{server.pid}/status").read()
    return "%d MiB resident, %s threads" % (
        int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, re.search(r"Threads:\s+(\d+)", status)[1])


def drained(namespace, sink, server):
    """Lets the branch go; gives records a second until nothing is left."""
    began = time.time()
    branch("resume", namespace, sink)
    while lag(namespace) != 0:
        if time.time() - began > 600:
            sys.exit(f"{namespace}: {lag(namespace)} left after ten minutes")
        time.sleep(0.2)
    return records / (time.time() - began)


def wrk(namespace, seconds=10):
    command = ["wrk", "-t1", "-c128", f"-d{seconds}", "-s", f"{HERE}/write.lua", f"http://127.0.0.1:{PORT}"]
    out = subprocess.run(command, env=dict(os.environ, WALFLOW_NS=namespace), check=True, capture_output=True, text=True).stdout
    return re.search(r"RESULT (.*)", out)[1]


def redis_benchmark(*command):
    out = subprocess.run(["redis-benchmark", "-p", redis_port, "-P", "100", "-n", "500000", "-q", *command],
                         check=True, capture_output=True, text=True).stdout
    return re.findall(r"([\d.]+) requests per second", out)[-1]


def source(topic, more=""):
    return f"source: {{ kafka: {{ brokers: '{kafka}', topic: {RUN}-{topic}, topics: {{ partitions: 4 }} }}{more} }}\n"


with tempfile.TemporaryDirectory(dir=os.getenv("BENCH_TMP")) as folder:
    server = start(folder, "main", {
        "embedded": "sink: { stdout: {} }",
        "kafka": source("write") + "sink: { stdout: {} }",
        "streams": f"source: {{ redis: {{ url: '{REDIS}', prefix: {RUN} }} }}\nsink: {{ stdout: {{}} }}",
        "copy": source("copy") + "transform: [{ inline: 'payload.seen = true;' }]\n"
                + f"sink: {{ kafka: {{ brokers: '{kafka}', topic: {RUN}-out }}, batch: {{ records: 1000, linger: 5ms }} }}",
        "cache": source("cache")
                 + f"sink: {{ redis: {{ url: '{REDIS}/9', cases: [{{ key: 'k:{{record.id}}', value: '{{payload.value}}' }}] }}, batch: {{ records: 500, linger: 5ms }} }}",
        "made": source("out") + "sink: { stdout: {} }",
    })
    branches = {"embedded": "stdout", "kafka": "stdout", "streams": "stdout", "copy": "kafka", "cache": "redis", "made": "stdout"}
    for namespace, name in branches.items():
        branch("pause", namespace, name)
    for _ in range(2):
        print("HTTP, 128 connections, embedded:", wrk("embedded"), flush=True)
        print("HTTP, 128 connections, Kafka:   ", wrk("kafka"), flush=True)
        print("HTTP, 128 connections, streams: ", wrk("streams"), flush=True)
    print(f"NDJSON into streams: {upload('streams', 200_000):.0f}/s", flush=True)
    print(subprocess.run([peer, "append", REDIS, str(records // 2)], check=True, capture_output=True, text=True).stdout.strip(), flush=True)
    print("redis-benchmark -P 100 -d 512 XADD:", redis_benchmark("XADD", f"{RUN}-plain", "*", "v", "x" * 512), flush=True)
    print(f"NDJSON into Kafka: {upload('copy', records):.0f}/s; {records} behind: {resident(server)}", flush=True)
    print(f"Kafka, Rhai, Kafka: {drained('copy', 'kafka', server):.0f}/s, {resident(server)}", flush=True)
    upload("cache", records)
    print(f"Kafka to Redis SET: {drained('cache', 'redis', server):.0f}/s, {resident(server)}", flush=True)
    print("redis-benchmark -P 100 -d 512 SET:", redis_benchmark("-d", "512", "-r", "1000000", "-t", "set"), flush=True)
    stop(server)
    print(subprocess.run([peer, "copy", kafka, f"{RUN}-copy", f"{RUN}-out", str(records)],
                         check=True, capture_output=True, text=True).stdout.strip(), flush=True)
    region = "replicate: { regions: { a: { path: a }, b: { path: b }, c: { path: c } } }\nsink: { file: { path: x } }"
    server = start(folder, "idle", {f"idle-{i}": source(f"idle-{i}") + region for i in range(100)})
    time.sleep(20)
    print(f"100 idle namespaces with 3 branches each: {resident(server)}", flush=True)
    stop(server)
