"""The commit is that of the code, and of nothing else."""

import subprocess

from fedmmkt.server_app.record.provenance import git_commit


def git(folder, *command):
    identity = ("-c", "user.name=Someone", "-c", "user.email=someone@example.org")
    subprocess.run(["git", "-C", folder, *identity, *command], check=True, capture_output=True)


def test_the_commit_of_tracked_code_is_named_and_marked_if_it_changed(tmp_path):
    git(tmp_path, "init")
    code = tmp_path / "code"
    code.mkdir()
    (code / "a.py").write_text("a = 1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    head = subprocess.run(["git", "-C", tmp_path, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)

    clean = git_commit(code)
    (code / "a.py").write_text("a = 2")
    changed = git_commit(code)

    assert clean == head.stdout[:12]
    assert changed == f"{clean}-dirty"


def test_code_that_is_not_tracked_has_no_commit(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    git(tmp_path, "init")
    installed = tmp_path / "venv"
    installed.mkdir()
    (installed / "a.py").write_text("a = 1")

    assert git_commit(installed) == ""
    assert git_commit(outside) == ""
