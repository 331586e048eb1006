"""The measurement of the host's work runs on the engine as it is."""

import os
import subprocess
import sys


def test_it_prints_a_line_for_each_number_of_rows(root):
    command = [sys.executable, "scripts/bench_host.py", "--rows", "1", "3", "--steps", "20", "--prompt", "70"]
    command += ["--device-ms", "0.1"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    titles, *lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["1", "3"] and titles[0] == "rows"
    assert all(float(cell.rstrip("%")) >= 0 for line in lines for cell in line)
    assert all(0 < float(line[-1].rstrip("%")) <= 100 for line in lines)
