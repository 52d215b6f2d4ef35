"""Signals: the exit code is 128 + the signal's number, and there is never a traceback."""

import os
import signal
import subprocess
import sys

import pytest
from commands import LONG, rows, started

from metarun.system import lock

INTERRUPTED_IMPORT = """
import os, signal, sys
# A test run that was started in the background ignores Ctrl-C, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.{number})
sys.meta_path.insert(0, Interrupting())
sys.argv = ["metarun", *{arguments!r}]
from metarun.__main__ import {command}
{command}()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_a_checkpoint_and_gives_its_exit_code(tmp_path, number):
    process = started(*LONG, "hydra.run.dir=run", cwd=tmp_path)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "metarun resume='run'" in said
    assert "Traceback" not in said
    assert rows(tmp_path / "run" / "result.csv")[0]["status"] == "interrupted"
    assert not (tmp_path / "run" / lock.FILE).exists()


@pytest.mark.parametrize(
    ("module", "number", "command"),
    [
        ("hydra", "SIGINT", "main"),
        ("omegaconf", "SIGHUP", "main"),
        ("torch", "SIGINT", "main"),
        ("metarun.assemble", "SIGTERM", "main"),
        ("pandas", "SIGINT", "compare"),
        ("yaml", "SIGINT", "status"),
    ],
)
def test_a_signal_while_modules_are_imported_ends_in_silence(tmp_path, module, number, command):
    arguments = ["hydra.run.dir=run"] if command == "main" else ["."]
    code = INTERRUPTED_IMPORT.format(module=module, number=number, arguments=arguments, command=command)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 128 + getattr(signal, number), done.stderr
    assert not done.stderr
    assert not (tmp_path / "run" / lock.FILE).exists()


def test_a_signal_that_nohup_has_turned_off_stays_off(tmp_path):
    code = (
        "import signal, os; from metarun.system.signals import handled_by, stop; import metarun.__main__\n"
        "with handled_by(stop): os.kill(os.getpid(), signal.SIGHUP)\n"
        "print('still here')"
    )
    ignoring = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", sys.executable, "-c", code]
    done = subprocess.run(ignoring, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout == "still here\n"
