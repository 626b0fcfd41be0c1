"""What a launcher leaves on the screen when something goes wrong."""

import re
import subprocess
import sys

import commands
import pytest

LAUNCHER = """
import sys, threading, time
from absl import flags, logging
from launch import cli

def main(_):
  logging.info("not said")
  what = flags.FLAGS.what
  if what in ("quiet", "stopped", "defect"):
    time.sleep(0.5)  # the reader has gone
    if what == "defect":
      raise RuntimeError("a defect")
    sys.exit(75 if what == "stopped" else 0)
  if what == "print":
    for _ in range(100_000):
      print("a line that is long enough to fill a pipe")
    return
  if what == "log":
    try:
      1 / 0
    except ZeroDivisionError:
      logging.exception("a library failed")
  if what in ("log", "thread"):
    foreign = threading.Thread(target=lambda: [1][1], name="foreign")
    foreign.start()
    foreign.join()
  if what == "later":  # as what saves in the background is cut off
    threading.Thread(target=lambda: threading.main_thread().join() or [1][1]).start()
  raise ValueError("The table x.csv is missing: mend it.")

cli.run(main, lambda: flags.DEFINE_string("what", "", ""))
"""


def launcher(what, tmp_path, pipe=""):
  """The process of a launcher that fails; `pipe` reads what it prints, and the exit code is printed behind its stderr."""
  (tmp_path / "launcher.py").write_text(LAUNCHER)
  command = f"{sys.executable} {tmp_path}/launcher.py --what={what} {pipe}; echo rc ${{PIPESTATUS[0]}} >&2"
  env = {"PYTHONPATH": str(commands.ROOT), "TMPDIR": str(tmp_path), "PATH": "/bin:/usr/bin"}
  done = subprocess.run(["bash", "-c", command], cwd=commands.ROOT, env=env, capture_output=True, text=True)
  *lines, code = done.stderr.splitlines()
  logs = list(tmp_path.glob("qimg2-*.log"))
  return done.stdout, lines, code, logs[0].read_text() if logs else "", logs


SENTENCE = "error: The table x.csv is missing: mend it."


@pytest.mark.parametrize("what, said, in_log", [
    ("", [SENTENCE], []),
    ("log", [r"E.*\] a library failed \(its traceback is in LOG\)",
             r"The thread 'foreign': IndexError: list index out of range \(its traceback is in LOG\)",
             f"{SENTENCE} More is in LOG."], ["ZeroDivisionError: division by zero", "IndexError: list index"]),
    ("later", [SENTENCE, "What was cut off by that said more, in LOG."], ["IndexError: list index"])])
def test_the_sentence_comes_last_and_tracebacks_of_others_lie_in_a_file_that_is_named(tmp_path, what, said, in_log):
  out, lines, code, log, paths = launcher(what, tmp_path)
  assert (out, code, len(paths)) == ("", "rc 1", int(bool(in_log)))
  assert len(lines) == len(said)
  for line, pattern in zip(lines, said):
    assert re.fullmatch(pattern.replace("LOG", str(paths[0]) if paths else ""), line), (line, pattern)
  assert all(text in log for text in in_log) and "Traceback" not in "".join(lines)


@pytest.mark.parametrize("content, said", [
    (None, "There is no TABLE: correct --source"), ("image,caption\n".encode("utf-16"), "TABLE is UTF-16 or UTF-32, or no text, and tables are read"),
    ("image,caption\n".encode("utf-16-le"), "iconv -f UTF-16 -t UTF-8 TABLE > utf8.csv.")])
def test_a_table_that_is_missing_or_no_utf_8_is_named(tmp_path, content, said):
  table = tmp_path / "table.csv"
  if content:
    table.write_bytes(content)
  result = commands.launch("launch.prepare_data", f"--source={table}", "--name=mine", f"--out={tmp_path}/out")
  assert result.returncode == 1 and said.replace("TABLE", str(table)) in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
  assert not (tmp_path / "out").exists()


def test_a_closed_pipe_ends_quietly(tmp_path):
  out, lines, code, _, paths = launcher("print", tmp_path, "| head -1")
  assert (out, lines, code, paths) == ("a line that is long enough to fill a pipe\n", [], "rc 141", [])
  assert launcher("print", tmp_path, "2>&1 | head -1")[1:3] == ([], "rc 141")
  assert launcher("print", tmp_path, "> /dev/null")[1:3] == ([], "rc 0")


def test_how_a_launcher_ends_does_not_hang_on_who_reads_it(tmp_path):
  assert launcher("quiet", tmp_path, "| true")[2] == "rc 0" and launcher("stopped", tmp_path, "| true")[2] == "rc 75"
  assert launcher("stopped", tmp_path, ">&-")[2] == "rc 75"
  _, lines, code, _, _ = launcher("defect", tmp_path, "| true")
  assert code == "rc 1" and lines[-1] == "RuntimeError: a defect"
