"""Programs in forks of a process that has imported torch, which takes longer than most of them run.

A connection (file descriptor argv[1]) says what to run: a JSON of (words, environment, folder), and four descriptors. The last of them
is told the program's process id and, when it has ended, its exit code, a line each.
"""

import json
import os
import runpy
import signal
import socket
import sys

import matplotlib.figure  # noqa: F401
import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import torch._dynamo  # noqa: F401
import torch.distributed.fsdp  # noqa: F401


def main():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as line:
        while True:
            message, given, *_ = socket.recv_fds(line, 1 << 20, 4)
            if not message:
                return
            if not os.fork():
                break
            for descriptor in given:
                os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, report = given
    if program := os.fork():
        for stream in streams:
            os.close(stream)
        os.write(report, b"%d\n" % program)
        os.write(report, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]))
        os._exit(0)
    os.close(report)
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.argv, env, folder = json.loads(message)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    sys.path[1:1] = env["PYTHONPATH"].split(":")
    runpy.run_path(sys.argv[0], run_name="__main__")


main()
