"""The part of `base` that is written, not linked: /etc, the home directories, the empty mount points.

Nothing here is read from the machine's own /etc: an administrator's secrets live there, and even an innocent file
may name the company. All text is ours, all ids are the canonical ones a sandbox sees (0, 1000).

`bash -l -c CMD` runs once per command of a client, so the profile prints nothing and forks nothing: no `id`, no
`dircolors`, no command substitution.
"""

from __future__ import annotations

from typing import Final, NamedTuple

USER: Final = "user"
USER_ID: Final = 1000
_SHADOW_ID: Final = 42  # Debian's static gid of `shadow`


class Text(NamedTuple):
    """A file with this content. Ids as seen inside a sandbox."""

    content: bytes
    mode: int = 0o644
    uid: int = 0
    gid: int = 0


class Folder(NamedTuple):
    mode: int = 0o755
    uid: int = 0
    gid: int = 0


class Symlink(NamedTuple):
    target: str


Made = Text | Folder | Symlink

_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_ACCOUNTS: Final = """\
root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
bin:x:2:2:bin:/bin:/usr/sbin/nologin
sys:x:3:3:sys:/dev:/usr/sbin/nologin
mail:x:8:8:mail:/var/mail:/usr/sbin/nologin
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
user:x:1000:1000:user:/home/user:/bin/bash
"""

_GROUP: Final = """\
root:x:0:
daemon:x:1:
bin:x:2:
sys:x:3:
adm:x:4:
tty:x:5:
disk:x:6:
mail:x:8:
kmem:x:15:
sudo:x:27:
www-data:x:33:
shadow:x:42:
utmp:x:43:
staff:x:50:
users:x:100:
nogroup:x:65534:
user:x:1000:
"""

# The root of a sandbox is the one the sandbox's own user namespace gives; `user` may become it without being asked.
# !fqdn: Debian builds sudo to look its host name up in DNS, which costs a timeout where there is no network.
_SUDOERS: Final = f"""\
Defaults env_reset
Defaults env_keep += "PENSTOCK_NOTICE"
Defaults !fqdn
Defaults !lecture
Defaults !syslog
Defaults secure_path="{_PATH}"
root ALL=(ALL:ALL) ALL
%sudo ALL=(ALL:ALL) NOPASSWD: ALL
{USER} ALL=(ALL:ALL) NOPASSWD: ALL
@includedir /etc/sudoers.d
"""

_PAM_OPEN: Final = """\
auth sufficient pam_rootok.so
auth required pam_unix.so
account required pam_permit.so
password required pam_unix.so
session required pam_permit.so
"""

_PAM_CLOSED: Final = """\
auth required pam_deny.so
account required pam_deny.so
password required pam_deny.so
session required pam_deny.so
"""

_PROFILE: Final = f"""\
# Read by every login shell, that is by every command a client runs. Keep it silent and free of forks.
# Without a PATH in its environment bash has made one up that ends in ".", which nobody asked for.
case ":${{PATH-}}:" in
  :: | *:.:*) PATH={_PATH} ;;
esac
export PATH
export LANG="${{LANG:-C.UTF-8}}"
for script in /etc/profile.d/*.sh; do
  if [ -r "$script" ]; then . "$script"; fi
done
unset script
if [ -n "${{PS1-}}" ] && [ -n "${{BASH_VERSION-}}" ] && [ -r /etc/bash.bashrc ]; then . /etc/bash.bashrc; fi
"""

_BASHRC: Final = """\
# Interactive shells only.
case $- in
  *i*) ;;
  *) return ;;
esac
shopt -s checkwinsize
PS1='\\u@\\h:\\w\\$ '
"""

_HOME_PROFILE: Final = """\
# Read by login shells.
if [ -d "$HOME/.local/bin" ]; then PATH="$HOME/.local/bin:$PATH"; fi
if [ -n "${BASH_VERSION-}" ] && [ -r "$HOME/.bashrc" ]; then . "$HOME/.bashrc"; fi
"""

_HOME_BASHRC: Final = """\
# Read by interactive shells.
case $- in
  *i*) ;;
  *) return ;;
esac
HISTCONTROL=ignoreboth
shopt -s histappend
alias ls='ls --color=auto'
alias ll='ls -l'
alias grep='grep --color=auto'
"""

_LOCAL: Final = ("bin", "etc", "include", "lib", "sbin", "share", "src")

_HOME_LOGOUT: Final = "# Read when a login shell ends.\n"

_SERVICES: Final = """\
echo 7/tcp
echo 7/udp
ftp-data 20/tcp
ftp 21/tcp
ssh 22/tcp
telnet 23/tcp
smtp 25/tcp mail
time 37/tcp
domain 53/tcp
domain 53/udp
bootps 67/udp
bootpc 68/udp
tftp 69/udp
http 80/tcp www
kerberos 88/tcp
kerberos 88/udp
pop3 110/tcp
ntp 123/udp
imap2 143/tcp imap
snmp 161/udp
ldap 389/tcp
ldap 389/udp
https 443/tcp
https 443/udp
submission 587/tcp
ldaps 636/tcp
rsync 873/tcp
imaps 993/tcp
pop3s 995/tcp
mysql 3306/tcp
postgresql 5432/tcp
git 9418/tcp
"""

_PROTOCOLS: Final = """\
ip 0 IP
icmp 1 ICMP
igmp 2 IGMP
tcp 6 TCP
udp 17 UDP
ipv6 41 IPv6
gre 47 GRE
esp 50 ESP
ah 51 AH
ipv6-icmp 58 IPv6-ICMP
sctp 132 SCTP
udplite 136 UDPLite
"""

_MIME: Final = """\
application/gzip gz
application/json json map
application/octet-stream bin
application/pdf pdf
application/wasm wasm
application/x-tar tar
application/xml xml
application/zip zip
audio/mpeg mp3
audio/ogg oga ogg
audio/x-wav wav
font/woff woff
font/woff2 woff2
image/gif gif
image/jpeg jpeg jpg
image/png png
image/svg+xml svg
image/webp webp
image/x-icon ico
text/css css
text/csv csv
text/html html htm
text/javascript js mjs
text/markdown md
text/plain txt text log
video/mp4 mp4
video/webm webm
"""

_LOGIN_DEFS: Final = f"""\
ENV_PATH PATH={_PATH}
ENV_SUPATH PATH={_PATH}
UMASK 022
HOME_MODE 0755
UID_MIN 1000
UID_MAX 60000
GID_MIN 1000
GID_MAX 60000
USERGROUPS_ENAB yes
CREATE_HOME yes
ENCRYPT_METHOD YESCRYPT
"""

_OPENSSL: Final = """\
openssl_conf = ours
[ours]
ssl_conf = ssl
[ssl]
system_default = system
[system]
MinProtocol = TLSv1.2
CipherString = DEFAULT:@SECLEVEL=2
[req]
distinguished_name = name
[name]
"""

_NSSWITCH: Final = """\
passwd: files
group: files
shadow: files
gshadow: files
hosts: files dns
networks: files
protocols: files
services: files
ethers: files
rpc: files
"""

_HOSTS: Final = """\
127.0.0.1 localhost
::1 localhost ip6-localhost ip6-loopback
"""


def _locked(names_from: str, fields: str) -> str:
    """A shadow or gshadow file in which every account of `names_from` has a password that nothing matches."""
    return "".join(f"{line.split(':')[0]}:*:{fields}\n" for line in names_from.splitlines())


def _etc() -> dict[str, Made]:
    plain: dict[str, str] = {
        "passwd": _ACCOUNTS,
        "group": _GROUP,
        "hosts": _HOSTS,
        "hostname": "sandbox\n",
        "host.conf": "multi on\n",
        "resolv.conf": "# Written when the sandbox starts.\n",
        "nsswitch.conf": _NSSWITCH,
        "profile": _PROFILE,
        "bash.bashrc": _BASHRC,
        "environment": f'PATH="{_PATH}"\n',
        "shells": "/bin/sh\n/bin/bash\n/usr/bin/bash\n/bin/dash\n",
        "services": _SERVICES,
        "protocols": _PROTOCOLS,
        "mime.types": _MIME,
        "login.defs": _LOGIN_DEFS,
        "inputrc": "set meta-flag on\nset convert-meta off\nset output-meta on\n",
        "timezone": "Etc/UTC\n",
        "machine-id": "",
        "motd": "",
        "fstab": "",
        "sudo.conf": "Set disable_coredump true\n",
        "ld.so.conf": "include /etc/ld.so.conf.d/*.conf\n",
        "ssl/openssl.cnf": _OPENSSL,
        "pam.d/other": _PAM_CLOSED,
    }
    plain |= {f"pam.d/{service}": _PAM_OPEN for service in ("sudo", "sudo-i", "su", "su-l", "login", "passwd")}
    made: dict[str, Made] = {f"etc/{name}": Text(text.encode()) for name, text in plain.items()}
    made |= {
        "etc/shadow": Text(_locked(_ACCOUNTS, "20000:0:99999:7:::").encode(), 0o640, gid=_SHADOW_ID),
        "etc/gshadow": Text(_locked(_GROUP, ":").encode(), 0o640, gid=_SHADOW_ID),
        "etc/sudoers": Text(_SUDOERS.encode(), 0o440),
        "etc/sudoers.d": Folder(0o750),
        "etc/profile.d": Folder(),
        "etc/localtime": Symlink("/usr/share/zoneinfo/Etc/UTC"),
        "etc/os-release": Symlink("../usr/lib/os-release"),
        "etc/mtab": Symlink("/proc/self/mounts"),
        "usr/lib/ssl/cert.pem": Symlink("/etc/ssl/certs/ca-certificates.crt"),
        "usr/bin/python": Symlink("python3"),
    }
    return made


def _home(folder: str, owner: int, mode: int) -> dict[str, Made]:
    texts = {".bashrc": _HOME_BASHRC, ".profile": _HOME_PROFILE, ".bash_logout": _HOME_LOGOUT}
    made: dict[str, Made] = {folder: Folder(mode, owner, owner)}
    made |= {f"{folder}/{name}": Text(text.encode(), 0o644, owner, owner) for name, text in texts.items()}
    return made


def skeleton() -> dict[str, Made]:
    """Every made entry of `base`, by path without the leading slash."""
    made = _etc() | _home("root", 0, 0o700) | _home(f"home/{USER}", USER_ID, 0o755) | _home("etc/skel", 0, 0o755)
    folders = (
        "boot dev home media mnt opt proc run srv sys var/cache var/lib/dpkg/info var/lib/misc var/local var/log "
        "var/opt var/spool " + " ".join(f"usr/local/{name}" for name in _LOCAL)
    ).split()
    made |= {path: Folder() for path in folders}
    made |= {path: Folder(0o1777) for path in ("tmp", "var/tmp", "run/lock")}
    made |= {
        "var/mail": Folder(0o2775, gid=8),
        "var/lock": Symlink("/run/lock"),
        "var/run": Symlink("/run"),
        "var/lib/dpkg/available": Text(b""),
    }
    return made
