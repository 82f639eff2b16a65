"""A certificate for one command's cluster, held in memory alone: who has its key may send code to the workers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

NAME = "volseg-cluster"
VALID_DAYS = 365  # of a command; and as long before now, for clocks that are set back


def temporary_certificate() -> tuple[str, str]:
    """A new self-signed certificate and its key, both PEM.

    On an elliptic curve: the RSA keys of `distributed.security.Security.temporary` take 50 ms of each command to make.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=VALID_DAYS))
        .not_valid_after(now + timedelta(days=VALID_DAYS))
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode()
