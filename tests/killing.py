"""Death at a chosen moment, for scripts that tests run in a process of their own."""

import os
import signal
import sys


def outlives(kill_at, action):
    """Run `action` in a fork that kills itself just before the n-th system call that Python makes to change a file.

    Returns whether the action ended before it came to that.
    """
    pid = os.fork()
    if pid == 0:
        count = 0

        def hook(event, args):
            nonlocal count
            if event == "open" or event.split(".")[0] in ("os", "shutil", "ctypes"):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        action()
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0
