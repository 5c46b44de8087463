"""Makes an API key: `python -m oasst_gateway.keys`. The key is shown once; the tenants file keeps its SHA-256."""

from oasst_gateway.tenants import draw_api_key

__all__ = ["main"]


def main() -> None:
    key = draw_api_key()
    print(f"Give to the caller, it is not stored anywhere:\n\n    {key.key}\n")
    print(f'Put into `keys` of its tenant:\n\n    {{ id = "{key.key_id}", sha256 = "{key.sha256}" }}')


if __name__ == "__main__":
    main()
