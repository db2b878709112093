"""What tests of blocking code share."""

from __future__ import annotations

from tests.support.aws_servers import moto_url

__all__ = ["moto_url"]
