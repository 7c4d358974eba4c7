"""Commands in processes of their own that are forked from the tests', which has the libraries loaded already.

To import them anew takes five seconds. Signals, exit statuses, files and locks are those of a real process; tests of
how the interpreter begins and ends start one with :mod:`subprocess` instead.
"""

import os
import signal
import sys
import time
import warnings

from probattn.cli.app import main


class Forked:
    """``probattn`` with some words, running in a folder; what it prints goes into files beside that folder's others."""

    def __init__(self, *words, cwd):
        self.out, self.err = cwd / ".forked-out", cwd / ".forked-err"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads, which are idle here
            self.pid = os.fork()
        if self.pid == 0:
            self._run([str(word) for word in words], cwd)
        self.returncode = None

    def _run(self, words, cwd):
        status = 3
        try:
            # A run in the background inherits "ignore" for Ctrl-C, one under nohup for the end of the terminal.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            os.chdir(cwd)
            sys.stdout = self.out.open("w", encoding="utf-8", buffering=1)
            sys.stderr = self.err.open("w", encoding="utf-8", buffering=1)
            main(words)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self):
        """The status where the process has ended: that of the exit, or minus the number of the signal."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, seconds=60):
        """The status, when the process has ended."""
        return self.until(lambda: False, seconds)

    def until(self, condition, seconds=120):
        """Wait until something is so or the process has ended; returns the status, None while it runs."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and not condition():
            assert time.monotonic() < deadline, self.err.read_text(encoding="utf-8")
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number):
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.send_signal(signal.SIGKILL)
        self.wait()

    @property
    def errors(self):
        """Words of the command on its stream of errors."""
        return self.err.read_text(encoding="utf-8")
