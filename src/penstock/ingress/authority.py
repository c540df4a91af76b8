"""A certificate authority for one installation, for machines that were given no certificate.

It signs a wildcard certificate for the installation's domain and for nothing else: the authority's own certificate is
constrained to that domain, so that a person who trusts it trusts it with no other name. Keys never leave the folder
(0700, files 0600). A leaf lies in one file with its key, so that no crash can pair a key with another's certificate.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS: Final = 3650
LEAF_DAYS: Final = 90
RENEW_DAYS: Final = 30  # a leaf with less than this left is made anew
_BACKDATE: Final = datetime.timedelta(hours=1)  # clocks of clients differ
_FILE_MODE: Final = 0o600


class Issued(msgspec.Struct, frozen=True):
    """Paths of PEM files. `leaf` holds the key, the certificate, and the authority's."""

    authority: str
    leaf: str


def issue(folder: Path, domain: str, now: float) -> Issued:
    """A usable leaf for `domain` and `*.domain` at wall time `now`, made or renewed if need be. Raises OSError.

    A port in `domain` is ignored. An authority for another domain is replaced: people have to trust the new one.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = domain.rpartition(":")[0] if domain.rpartition(":")[2].isdigit() else domain
    moment = datetime.datetime.fromtimestamp(now, datetime.UTC)
    certificate_path, key_path, leaf_path = folder / "ca.pem", folder / "ca-key.pem", folder / "leaf.pem"
    authority = _read_authority(certificate_path, key_path, name, moment)
    if authority is None:
        authority = _make_authority(name, moment)
        _write(key_path, _pem_key(authority[1]))
        _write(certificate_path, _pem(authority[0]))
    if not _leaf_is_good(leaf_path, authority[0], name, moment):
        certificate, key = _make_leaf(name, moment, *authority)
        _write(leaf_path, _pem_key(key) + _pem(certificate) + _pem(authority[0]))
    return Issued(str(certificate_path), str(leaf_path))


def _read_authority(
    certificate_path: Path, key_path: Path, name: str, now: datetime.datetime
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None:
    """The kept authority, or None when there is none that may still sign for `name`."""
    try:
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        constraint = certificate.extensions.get_extension_for_class(x509.NameConstraints).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return None
    matching = isinstance(key, ec.EllipticCurvePrivateKey) and key.public_key() == certificate.public_key()
    named = constraint.permitted_subtrees == [x509.DNSName(name)]
    enough = certificate.not_valid_after_utc - now > datetime.timedelta(days=LEAF_DAYS)
    if not (matching and named and enough):
        return None
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return certificate, key


def _leaf_is_good(path: Path, authority: x509.Certificate, name: str, now: datetime.datetime) -> bool:
    try:
        pem = path.read_bytes()
        certificate = x509.load_pem_x509_certificates(pem)[0]
        key = serialization.load_pem_private_key(pem, password=None)
        certificate.verify_directly_issued_by(authority)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, TypeError, IndexError, x509.ExtensionNotFound):
        return False
    except Exception as error:
        if type(error).__name__ != "InvalidSignature":
            raise
        return False
    left = certificate.not_valid_after_utc - now
    covers = set(names.get_values_for_type(x509.DNSName)) == {name, f"*.{name}"}
    return covers and key.public_key() == certificate.public_key() and left > datetime.timedelta(days=RENEW_DAYS)


def _make_authority(name: str, now: datetime.datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Penstock local authority for {name}"[:64])])
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        _begin(subject, subject, key, now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.NameConstraints([x509.DNSName(name)], None), critical=True)
    )
    return builder.sign(key, hashes.SHA256()), key


def _make_leaf(
    name: str, now: datetime.datetime, authority: x509.Certificate, authority_key: ec.EllipticCurvePrivateKey
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"*.{name}"[:64])])
    names = x509.SubjectAlternativeName([x509.DNSName(f"*.{name}"), x509.DNSName(name)])
    builder = (
        _begin(subject, authority.subject, key, now, LEAF_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(names, critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
    )
    return builder.sign(authority_key, hashes.SHA256()), key


def _begin(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing, private from its first byte."""
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, path)
