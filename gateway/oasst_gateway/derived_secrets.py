"""What every gateway with the same secret knows without asking: resume tokens, and salts of the prefix cache."""

import hmac

__all__ = ["DerivedSecrets"]

_BYTES = 16


class DerivedSecrets:
    """Secrets derived from one, each for its own purpose: none tells another."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def resume_token(self, job_id: str) -> str:
        """Proves a right to the job."""
        return self._derive("resume", job_id).hex()

    def is_resume_token(self, token: str, job_id: str) -> bool:
        """Whether `token` is the job's; takes as long whether it nearly is or not at all."""
        return hmac.compare_digest(token.encode(), self.resume_token(job_id).encode())

    def cache_salt(self, tenant: str) -> bytes:
        """Keeps tenants from learning from the time a prompt takes whether another's began the same way."""
        return self._derive("prefix cache", tenant)

    def _derive(self, purpose: str, name: str) -> bytes:
        return hmac.digest(self._secret, f"{purpose}\0{name}".encode(), "sha256")[:_BYTES]
