"""Programs in forks of a process that has imported torch, which takes longer than most of them run.

A connection (file descriptor argv[1]) says what to run: a JSON of (words, environment, folder) and three descriptors; it is told the exit code.
"""

import json
import os
import runpy
import socket
import sys

import torch  # noqa: F401


def main():
    with socket.socket(fileno=int(sys.argv[1])) as line:
        while True:
            message, streams, *_ = socket.recv_fds(line, 1 << 20, 3)
            if not message:
                return
            if not (child := os.fork()):
                break
            for stream in streams:
                os.close(stream)
            line.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.argv, env, folder = json.loads(message)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.path[0] = folder
    runpy.run_path(sys.argv[0], run_name="__main__")


main()
