"""Fresh virtual environments with the package as a user installs it."""

import os
import subprocess
import sys
import sysconfig
import venv

from tests import ROOT


def fresh_environment(folder, *flower):
    """Make an environment with our wheel and with Flower as pip's arguments say; return its folder.

    What the package depends on is read from the present environment, since to install it again takes minutes; but
    Flower is installed, since its commands belong to an environment.
    """
    wheels, home = folder / "wheels", folder / "environment"
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(ROOT)]
    subprocess.run([sys.executable, *pip, *build], check=True)
    venv.create(home, with_pip=True)
    (packages_of(home) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([home / "bin" / "python", *pip, "install", *flower], check=True)
    ours = ["install", "--no-deps", "--ignore-installed", *wheels.glob("*.whl")]
    subprocess.run([home / "bin" / "python", *pip, *ours], check=True)
    return home


def packages_of(environment):
    return next(environment.glob("lib/python*/site-packages"))


def run(environment, *arguments, cwd):
    command = [environment / "bin" / arguments[0], *arguments[1:]]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, check=False)
