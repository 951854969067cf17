"""WATCH: a program that runs a command and prints its seconds and memory as JSON. Linux only."""

# A small program starts and watches each command: ru_maxrss of a child begins with what its parent
# held when it was forked, and a benchmark may hold torch.
WATCH = """
import json, os, re, sys, threading, time
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
anonymous, over = 0, threading.Event()
def watch():
    global anonymous
    while not over.wait(0.005):
        try:
            text = open(f"/proc/{pid}/status").read()
        except OSError:
            return
        found = re.search(r"RssAnon:\\s+(\\d+)", text)
        anonymous = max(anonymous, int(found[1]) if found else 0)
threading.Thread(target=watch, daemon=True).start()
_, status, used = os.wait4(pid, 0)
seconds = time.perf_counter() - start
over.set()
found = {"seconds": seconds, "CPU seconds": used.ru_utime + used.ru_stime}
found |= {"MiB": used.ru_maxrss / 1024, "MiB without files": anonymous / 1024}
print(json.dumps(found | {"exit": os.waitstatus_to_exitcode(status)}))
"""
