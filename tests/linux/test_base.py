"""The template `base`, made from this machine and entered by chroot over a throw-away overlay."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.model.errors import Unsupported
from penstock.model.template import Layer
from penstock.node.linux.base import REQUIRED_PACKAGES, build_base, missing_packages, verify
from penstock.node.linux.selection import plan

pytestmark = pytest.mark.root

# Everything in a mount namespace of its own, which the kernel takes down with the last process in it.
_ENTER = """
mount --make-rprivate / && mount -t tmpfs none "$1" && mkdir "$1/u" "$1/w" "$1/m" &&
mount -t overlay -o "lowerdir=$2,upperdir=$1/u,workdir=$1/w" none "$1/m" && mount -t proc none "$1/m/proc" &&
mknod -m 666 "$1/m/dev/null" c 1 3 && shift 2 &&
exec chroot "$PWD_M" /usr/bin/env -i "$@"
"""


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layers")


@pytest.fixture(scope="module")
def layer(layers: Path) -> Layer:
    said: list[str] = []
    made = build_base(str(layers), progress=said.append)
    assert said
    return made


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "point"
    folder.mkdir()
    yield folder
    assert not os.path.ismount(folder)


def inside(layer: Layer, point: Path, *argv: str, user: str = "user") -> subprocess.CompletedProcess[str]:
    """Run `argv` in the layer as `user`, with the environment a command of a client has."""
    home = "/root" if user == "root" else "/home/user"
    env = [f"HOME={home}", f"USER={user}", "TERM=xterm-256color",
           "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]  # fmt: skip
    ids = ["--reuid", "1000", "--regid", "1000", "--clear-groups"] if user == "user" else ["--clear-groups"]
    command = ["unshare", "-m", "sh", "-c", _ENTER, "sh", str(point), layer.path, *env, "setpriv", *ids, "--", *argv]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=False, env=os.environ | {"PWD_M": f"{point}/m"}
    )


def test_the_tools_clients_rely_on_are_there(layer: Layer, point: Path) -> None:
    script = """
        python --version; python3 --version; git --version; curl --version | head -1; ss -V; tput cols; tput -V
        pgrep --version; realpath /bin; readlink /bin; ps --version; awk 'BEGIN {print "awk"}'; which which
        sleep 0; printf '%s\\n' printf; kill -l >/dev/null; test -x /usr/lib/git-core/git-daemon && echo daemon
        id; whoami; pwd -P; date +%Z; ldconfig -p | head -1
    """
    done = inside(layer, point, "/bin/bash", "-l", "-e", "-c", f"cd; {script}")
    assert done.stderr == ""
    assert done.returncode == 0
    words = ("Python 3.", "git version", "curl ", "iproute2", "80", "ncurses", "procps", "usr/bin", "awk", "daemon",
             "uid=1000(user) gid=1000(user)", "/home/user", "UTC", "libs found")  # fmt: skip
    for word in words:
        assert word in done.stdout
    assert inside(layer, point, "/bin/sh", "-c", "command -v mcp-gateway").returncode != 0


def test_python_has_its_library_certificates_and_compiled_files(layer: Layer, point: Path) -> None:
    code = (
        "import ssl, sqlite3, ctypes, json, asyncio, http.server, os; "
        "print(ssl.create_default_context().cert_store_stats()['x509_ca'] > 50, json.__cached__ is not None, "
        "os.path.exists(json.__cached__), os.path.exists(asyncio.__cached__))"
    )
    done = inside(layer, point, "python", "-c", code)
    assert (done.stdout, done.stderr) == ("True True True True\n", "")


def test_sudo_needs_no_password_and_says_nothing(layer: Layer, point: Path) -> None:
    done = inside(
        layer,
        point,
        "/bin/bash",
        "-l",
        "-c",
        "SECRET=1 sudo -n id -u; SECRET=1 PENSTOCK_NOTICE=/n sudo -n env; ls -A ~",
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "0"
    assert "SECRET=1" not in lines
    assert "PENSTOCK_NOTICE=/n" in lines  # promised to every process
    assert ".bashrc" in lines
    assert ".sudo_as_admin_successful" not in lines  # watchers of the home would be told about it
    assert inside(layer, point, "su", "user", "-c", "id -un", user="root").stdout == "user\n"


def test_a_login_shell_prints_nothing_and_forks_nothing(layer: Layer, point: Path) -> None:
    # A process may have no child at all: whatever forks fails and says so.
    for user in ("user", "root"):
        done = inside(layer, point, "prlimit", "--nproc=1:1", "/bin/bash", "-l", "-c", "echo $PATH", user=user)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
    bare = inside(layer, point, "env", "-i", "/bin/bash", "-l", "-c", "true")
    assert (bare.stdout, bare.stderr) == ("", "")


def test_nothing_of_the_machines_own_is_in_the_layer(layer: Layer) -> None:
    tree = Path(layer.path)
    for name in ("shadow", "passwd", "group", "hostname", "hosts", "machine-id", "resolv.conf", "sudoers"):
        ours, theirs = tree / "etc" / name, Path("/etc") / name
        if theirs.exists() and theirs.stat().st_size:
            assert ours.read_bytes() != theirs.read_bytes(), name
    for absent in ("etc/ssh", "etc/ssl/private", "etc/apt", "root/.ssh", "var/log/dpkg.log", "usr/local/bin/python3"):
        assert not (tree / absent).exists(), absent
    assert (tree / "etc/machine-id").read_bytes() == b""
    assert sorted(os.listdir(tree / "root")) == [".bash_logout", ".bashrc", ".profile"]
    assert os.listdir(tree / "home") == ["user"]
    fields = [line.split(":")[1] for line in (tree / "etc/shadow").read_text().splitlines()]
    assert set(fields) == {"*"}
    for folder in ("etc", "root", "home", "var"):
        for parent, _, names in os.walk(tree / folder):
            for name in names:
                found = os.lstat(os.path.join(parent, name))
                assert not stat.S_ISREG(found.st_mode) or found.st_nlink == 1, f"{parent}/{name} is the machine's"


def test_ids_are_canonical_and_nothing_linked_can_be_changed_by_an_upgrade(layer: Layer) -> None:
    owners, linked = set(), 0
    for parent, folders, names in os.walk(layer.path):
        for name in (*folders, *names):
            path = os.path.join(parent, name)
            found = os.lstat(path)
            owners.add((found.st_uid, found.st_gid))
            assert not stat.S_ISCHR(found.st_mode) and not stat.S_ISBLK(found.st_mode), path
            if stat.S_ISREG(found.st_mode):
                linked += found.st_nlink > 1
                # dpkg takes the mode of a set-id file away before it unlinks it, on the inode: it must be a copy.
                assert not found.st_mode & 0o7000 or found.st_nlink == 1, path
            if not stat.S_ISLNK(found.st_mode) and path.startswith(f"{layer.path}/usr/"):
                assert found.st_mode & 0o004, path
    assert owners == {(0, 0), (1000, 1000), (0, 42), (0, 8)}
    same_file_system = os.stat(layer.path).st_dev == os.stat("/usr").st_dev
    assert not same_file_system or linked > 1000
    assert stat.S_IMODE(os.stat(f"{layer.path}/usr/bin/sudo").st_mode) == 0o4755


def test_links_lead_nowhere_outside_and_few_dangle(layer: Layer) -> None:
    dangling = []
    for parent, _, names in os.walk(layer.path):
        for name in names:
            path = os.path.join(parent, name)
            if os.path.islink(path):
                target = os.readlink(path)
                lands = f"{layer.path}{target}" if target.startswith("/") else os.path.join(parent, target)
                if not os.path.lexists(lands):
                    dangling.append(path.removeprefix(layer.path))
    assert len(dangling) < 10, dangling


def test_asking_again_gives_the_same_layer_and_it_verifies(layers: Path, layer: Layer) -> None:
    said: list[str] = []
    assert build_base(str(layers), progress=said.append) == layer
    assert said == ["base: unchanged"]
    assert verify(layer) == []
    assert layer.files > 1000 and layer.bytes > 10 << 20


# -- a machine of our own making -------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A merged-usr machine whose required packages own one small file each."""

    root = tmp_path / "root"
    (root / "usr/bin").mkdir(parents=True)
    (root / "bin").symlink_to("usr/bin")
    (root / "var/lib/dpkg/info").mkdir(parents=True)
    (root / "var/lib/dpkg/alternatives").mkdir()
    status = ""
    for relation in REQUIRED_PACKAGES:
        name = relation.split(" ")[0]
        status += f"Package: {name}\nStatus: install ok installed\nArchitecture: all\nVersion: 1\n"
        status += "Depends: lib-x (>= 1) | nothing, dpkg\n\n" if name == "bash" else "\n"
        listed(root, name, f"/bin/{name}")
    status += "Package: lib-x\nStatus: install ok installed\nArchitecture: amd64\nMulti-Arch: same\nVersion: 2\n\n"
    status += "Package: dpkg\nStatus: install ok installed\nArchitecture: all\nVersion: 2\n\n"
    status += "Package: gone\nStatus: deinstall ok config-files\nArchitecture: all\nVersion: 2\n\n"
    (root / "var/lib/dpkg/status").write_text(status)
    listed(root, "lib-x:amd64", "/usr/lib/x.so")
    listed(root, "dpkg", "/usr/bin/dpkg")
    return root


def listed(root: Path, package: str, *paths: str) -> None:
    """Make files and let `package` own them."""
    for path in paths:
        file = root / path.lstrip("/")
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{package} {path}")
    with (root / f"var/lib/dpkg/info/{package}.list").open("a") as lines:
        lines.write("/.\n/usr\n" + "".join(f"{path}\n" for path in paths))


def quiet(_: str) -> None:
    pass


def test_an_upgrade_of_the_machine_changes_no_layer_and_refresh_makes_a_new_one(root: Path, tmp_path: Path) -> None:
    layers = str(tmp_path / "layers")
    first = build_base(layers, progress=quiet, root=str(root))
    assert Path(first.path, "usr/lib/x.so").read_text() == "lib-x:amd64 /usr/lib/x.so"
    (root / "usr/lib/x.so.dpkg-new").write_text("version 2")
    os.rename(root / "usr/lib/x.so.dpkg-new", root / "usr/lib/x.so")
    assert verify(first) == []
    second = build_base(layers, progress=quiet, root=str(root))
    assert second.digest != first.digest
    assert Path(second.path, "usr/lib/x.so").read_text() == "version 2"
    assert Path(first.path, "usr/lib/x.so").read_text() == "lib-x:amd64 /usr/lib/x.so"
    assert (verify(first), verify(second)) == ([], [])


def test_equal_content_gives_the_same_layer_under_another_plan(root: Path, tmp_path: Path) -> None:
    layers = str(tmp_path / "layers")
    first = build_base(layers, progress=quiet, root=str(root))
    shutil.copy(root / "usr/bin/git", root / "usr/bin/git.new")
    os.rename(root / "usr/bin/git.new", root / "usr/bin/git")
    assert build_base(layers, progress=quiet, root=str(root)) == first
    assert sorted(os.listdir(layers)) == sorted([".lock", "base.json", first.digest.removeprefix("sha256:")])


def test_only_whitelisted_files_of_the_closure_come_in(root: Path, tmp_path: Path) -> None:
    outside = root / "etc/secret.d"
    outside.mkdir(parents=True)
    (outside / "key").write_text("secret")
    (root / "usr/share").mkdir()
    (root / "usr/share/leads-out").symlink_to(outside)
    listed(root, "bash", "/etc/shadow", "/var/lib/secret", "/opt/x", "/usr/share/man/man1/bash.1.gz",
           "/usr/share/leads-out/key", "/usr/bin/private", "/usr/bin/setuid", "/usr/bin/others", "/usr/local/bin/own",
           "/usr/share/doc/bash/README", "/usr/share/doc/bash/copyright")  # fmt: skip
    os.chmod(root / "usr/bin/private", 0o750)
    os.chmod(root / "usr/bin/setuid", 0o4755)
    os.chown(root / "usr/bin/others", 0, 42)
    os.chmod(root / "usr/bin/others", 0o2755)
    os.mkfifo(root / "usr/bin/fifo")
    listed(root, "bash", "/usr/bin/fifo")
    layer = build_base(str(tmp_path / "layers"), progress=quiet, root=str(root))
    tree = Path(layer.path)
    for absent in ("var/lib/secret", "opt/x", "usr/share/man", "usr/share/leads-out/key", "usr/bin/private",
                   "usr/bin/fifo", "usr/local/bin/own", "usr/share/doc/bash/README", "usr/bin/dpkg",
                   "etc/secret.d"):  # fmt: skip
        assert not (tree / absent).exists(), absent
    assert b"bash" not in (tree / "etc/shadow").read_bytes()
    assert (tree / "usr/share/doc/bash/copyright").exists()
    assert os.readlink(tree / "bin") == "usr/bin"
    assert (tree / "usr/bin/bash").stat().st_ino == (root / "usr/bin/bash").stat().st_ino
    for name, mode in (("setuid", 0o4755), ("others", 0o755)):
        copied = (tree / "usr/bin" / name).stat()
        assert (stat.S_IMODE(copied.st_mode), copied.st_uid, copied.st_gid, copied.st_nlink) == (mode, 0, 0, 1)
    assert stat.S_IMODE((root / "usr/bin/others").stat().st_mode) == 0o2755  # the machine's own is untouched


def test_verify_names_every_difference(root: Path, tmp_path: Path) -> None:
    layer = build_base(str(tmp_path / "layers"), progress=quiet, root=str(root))
    tree = Path(layer.path)
    (tree / "usr/bin/git").unlink()
    (tree / "usr/bin/added").touch()
    (root / "usr/bin/curl").write_text("written in place")
    os.chmod(tree / "etc/profile", 0o600)
    (tree / "etc/localtime").unlink()
    (tree / "etc/localtime").symlink_to("elsewhere")
    assert verify(layer) == [
        "usr/bin/git is missing", "usr/bin/added was added", "etc/localtime changed its target",
        "etc/profile changed its mode", "usr/bin/curl changed its sha256, size",
    ]  # fmt: skip


def test_an_interrupted_build_is_swept_and_what_is_missing_is_named(root: Path, tmp_path: Path) -> None:
    layers = tmp_path / "layers"
    (layers / ".building-dead/tree/usr").mkdir(parents=True)
    build_base(str(layers), progress=quiet, root=str(root))
    assert not [name for name in os.listdir(layers) if name.startswith(".building")]
    status = root / "var/lib/dpkg/status"
    status.write_text(status.read_text().replace("Package: git\n", "Package: other\n"))
    assert missing_packages(str(root)) == ["git"]
    with pytest.raises(Unsupported, match="apt-get install git"):
        build_base(str(layers), progress=quiet, root=str(root))
    assert missing_packages(str(tmp_path)) != []


def test_alternatives_are_the_best_the_layer_has(root: Path) -> None:
    listed(root, "mawk", "/usr/bin/mawk")
    links, choices = ["/usr/bin/awk", "nawk", "/usr/bin/nawk", ""], ["/usr/bin/gawk", "10", "/usr/bin/gawk"]
    choices += ["/usr/bin/mawk", "5", "/usr/bin/mawk", "", ""]
    (root / "var/lib/dpkg/alternatives/awk").write_text("\n".join(["manual", *links, *choices]))
    entries = plan(str(root))
    assert entries["usr/bin/awk"] == ("/etc/alternatives/awk",)
    assert entries["etc/alternatives/awk"] == ("/usr/bin/mawk",)
    assert entries["etc/alternatives/nawk"] == ("/usr/bin/mawk",)


def test_two_builds_of_the_same_machine_have_the_same_digest(layer: Layer, tmp_path: Path) -> None:
    assert build_base(str(tmp_path / "layers"), progress=quiet).digest == layer.digest
