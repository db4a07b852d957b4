"""Certificates of an authority that is made for a test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certified:
    """Files, all PEM."""

    authority: str
    certificate: str
    key: str


def certified(folder: Path, *names: str) -> Certified:
    """What a host with these names and addresses shows, and who vouches for it."""
    folder.mkdir(parents=True, exist_ok=True)
    authority, there = trustme.CA(), Certified(*(str(folder / name) for name in ("ca.pem", "cert.pem", "key.pem")))
    issued = authority.issue_cert(*names)
    authority.cert_pem.write_to_path(there.authority)
    issued.cert_chain_pems[0].write_to_path(there.certificate)
    issued.private_key_pem.write_to_path(there.key)
    Path(there.key).chmod(0o600)
    return there
