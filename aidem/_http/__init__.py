"""The `Idempotency-Key` layer behind `aidem.asgi` and `aidem.fastapi`."""
