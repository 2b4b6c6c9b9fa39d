"""JSON lines between a process and its child."""

import io
import subprocess
import sys
import threading

from app.domain.attempts import ChildCommand
from tests.conftest import ROOT
from worker.json_lines import MessageWriter, read_messages


def test_messages_of_many_threads_stay_whole_and_unparseable_ones_are_rejected() -> None:
    out = io.BytesIO()
    writer = MessageWriter(out)
    threads = [threading.Thread(target=writer.send, args=(ChildCommand(command="pause"),)) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    out.write(b'{"command": "jump"}\n')
    taken: list[ChildCommand] = []
    rejected: list[bytes] = []
    read_messages(io.BytesIO(out.getvalue()), ChildCommand.model_validate_json, taken.append, rejected.append)
    assert taken == [ChildCommand(command="pause")] * 50
    assert rejected == [b'{"command": "jump"}\n']


def test_output_of_a_library_goes_to_stderr() -> None:
    code = "from worker.json_lines import take_stdout\nout = take_stdout()\n"
    code += "print('noise', flush=True)\nout.write(b'message')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == (b"message", b"noise\n")
