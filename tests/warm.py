"""Programs in forks of a process that has imported torch, which takes longer than most of them run, as does taking it down at the end.

A connection (file descriptor argv[1]) says what to run: a JSON of (words, environment, folder), and four descriptors. The last of them
is told the program's process id and, when it has ended, its exit code, a line each.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback

import matplotlib.figure  # noqa: F401
import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import torch._dynamo  # noqa: F401
import torch.distributed.fsdp  # noqa: F401


def main():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()  # pages that no fork's garbage collection touches stay shared
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
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


main()
