# SPDX-License-Identifier: Apache-2.0
"""``fork_client.py SOCKET PYTHON ARGUMENTS`` behaves as ``PYTHON ARGUMENTS``.

It becomes PYTHON, or for ``[-u] -m MODULE`` asks tests/fork_server.py for a fork: hands arguments,
environment, working directory and standard streams over, passes on the signals that it gets, and
ends as the fork ends. It also becomes PYTHON where the server refuses.
"""

import array
import marshal
import os
import resource
import select
import signal
import socket
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

address, python, *arguments = sys.argv[1:]
try:
    streams = array.array("i", [os.open(".", os.O_RDONLY), *(os.dup(i) for i in range(3))])
except OSError:  # one of them is closed
    streams = array.array("i")
is_unbuffered = arguments[:1] == ["-u"]
options, module = arguments[: 1 + is_unbuffered], arguments[1 + is_unbuffered :]
if options[-1:] != ["-m"] or not streams:
    os.execv(python, [python, *arguments])
signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until it is known whom to pass them to
request = marshal.dumps((module, is_unbuffered, dict(os.environb)))
server = socket.socket(socket.AF_UNIX)
server.connect(address)
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
server.sendmsg([b"%20d" % len(request)], rights)
server.sendall(request)
fork = int(server.recv(20, socket.MSG_WAITALL))
signals, woken = socket.socketpair()
if fork:
    for number in PASSED_ON:
        signal.signal(number, lambda *_: None)
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno())
signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
if not fork:
    os.execv(python, [python, *arguments])
for stream in (0, 1, 2, *streams):
    os.close(stream)  # a pipe ends when its last writer closes it: that is the fork now
while server not in select.select([server, signals], [], [])[0]:
    for number in signals.recv(64):
        os.kill(fork, number)
status = int(server.recv(20, socket.MSG_WAITALL))
if status < 0:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
