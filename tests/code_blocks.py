"""Code blocks of Markdown pages, and a clean interpreter to run them in."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def python_blocks(page):
  """The Python blocks of a page of the repository, in order."""
  text = (ROOT / page).read_text()
  return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run_python(code, folder, timeout=300):
  """Runs code as a script in a new interpreter; the finished process."""
  script = folder / "script.py"
  script.write_text(code)
  return subprocess.run(
    [sys.executable, str(script)],
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    cwd=folder,
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )
