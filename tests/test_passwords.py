from __future__ import annotations

import pytest

from bgen.passwords import names_a_secret, without_passwords


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://ann:hush@host:5000/x", "http://host:5000/x"),
        ("said: https://tok3n@host/api: failed", "said: https://host/api: failed"),
        ("postgresql://u:p@ss@db/mlflow and s3://k:s@bucket", "postgresql://db/mlflow and s3://bucket"),
        ("postgresql:///db?user=u&password=hush&ssl=1", "postgresql:///db?user=u&password=&ssl=1"),
        ("https://h/x?X-Amz-Signature=hush&a=1", "https://h/x?X-Amz-Signature=&a=1"),
        ("sqlite:////data/me@home/mlflow.db", "sqlite:////data/me@home/mlflow.db"),
        ("mail me@home, 3 @ 4", "mail me@home, 3 @ 4"),
        ("s3://bucket/store", "s3://bucket/store"),
    ],
)
def test_addresses_lose_their_passwords_and_nothing_else(text: str, shown: str) -> None:
    assert without_passwords(text) == shown


def test_names_that_say_secret() -> None:
    assert [names_a_secret(name) for name in ("NCCL_DEBUG", "BGEN_TOKEN", "X_API_KEY", "DB_PASSWORD")] == [
        False,
        True,
        True,
        True,
    ]
