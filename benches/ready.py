#!/usr/bin/env python3
"""How long after `kill -9` a data folder with many segments is ready, and what 1 and 1,000 idle namespaces take.

usage: benches/ready.py WALFLOW [GIB]      (target/release/walflow; needs python3 alone)
"""
import http.client, os, re, signal, subprocess, sys, tempfile, threading, time

walflow, gib = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 10
PORT = int(os.getenv("BASE_PORT", "4200"))
LINE = ('{"namespace":"many","payload":{"value":"%s"}}\n' % ("x" * 4000)).encode()


def get(path):
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    return answer.status


def upload(lines):
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=600)
    connection.putrequest("POST", "/api/v1/wal/write/batch")
    connection.putheader("Content-Type", "application/x-ndjson")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    answers = connection.sock.makefile("rb")
    reader = threading.Thread(target=lambda: [None for row in iter(answers.readline, b"0\r\n") if row])
    reader.start()
    chunk = LINE * 250
    for _ in range(lines // 250):
        connection.send(b"%x\r\n" % len(chunk) + chunk + b"\r\n")
    connection.send(b"0\r\n\r\n")
    reader.join()
    connection.close()


def start(folder, data):
    began = time.time()
    log = open(f"{folder}/log", "a")
    server = subprocess.Popen(
        [walflow, "run", f"{folder}/pipelines", "--data", data, "--listen", f"127.0.0.1:{PORT}"], stdout=log, stderr=log)
    while True:
        try:
            if get("/readyz") == 200:
                return server, time.time() - began
        except OSError:
            pass
        if server.poll() is not None:
            sys.exit(open(f"{folder}/log").read()[-2000:])
        time.sleep(0.002)


def anonymous(pid):
    status = open(f"/proc/{pid}/status").read()
    return "%d MiB resident" % (int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024)


with tempfile.TemporaryDirectory(dir=os.getenv("BENCH_TMP")) as folder:
    os.mkdir(f"{folder}/pipelines")
    def pipeline(name, more=""):
        open(f"{folder}/pipelines/{name}.yaml", "w").write("namespace: %s\n%ssink: { stdout: {} }\n" % (name, more))

    pipeline("many", "source: { embedded: { retention: { age: 7d, size: 100GiB } }, backlog: { size: 100GiB } }\n")
    server, took = start(folder, f"{folder}/idle")
    time.sleep(2)
    print("1 namespace: ready after %.0f ms, idle %s" % (took * 1000, anonymous(server.pid)))
    server.kill(); server.wait()
    for i in range(999):
        pipeline("idle-%d" % i)
    server, took = start(folder, f"{folder}/idle")
    time.sleep(2)
    print("1,000 namespaces: ready after %.0f ms, idle %s" % (took * 1000, anonymous(server.pid)))
    server.kill(); server.wait()
    subprocess.run(["rm", "-rf", f"{folder}/idle"] + [f"{folder}/pipelines/idle-{i}.yaml" for i in range(999)])

    data = f"{folder}/data"
    server, _ = start(folder, data)
    subprocess.run([walflow, "branch", "pause", "many", "stdout", "--url", f"http://127.0.0.1:{PORT}"], capture_output=True)
    began = time.time()
    threads = [threading.Thread(target=upload, args=(int(gib * (1 << 30) / 4100 / 2),)) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    took = time.time() - began
    server.send_signal(signal.SIGKILL); server.wait()
    size = int(subprocess.run(["du", "-sm", f"{data}/segments"], capture_output=True, text=True).stdout.split()[0])
    print("written %.1f GiB of segments in %.0f s (%.0f MiB/s)" % (size / 1024, took, size / took))
    for life in range(3):
        server, took = start(folder, data)
        print("ready %.0f ms after a start that followed kill -9; %s" % (took * 1000, anonymous(server.pid)))
        server.send_signal(signal.SIGKILL); server.wait()
