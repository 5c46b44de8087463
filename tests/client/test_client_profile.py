"""How a service is reached, told by file and environment."""

from pathlib import Path

import pytest
from oasst_client import Profile, ProfileError, connect, connect_async, load_profile, open_channel
from oasst_client.testing import FakeServer

FILE = """
[default]
address = "home.example:1"

[work]
address = "work.example:443"
api_key = "work-key"
tls_ca_file = "ca.pem"
"""


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "profiles.toml").write_text(FILE)
    return tmp_path / "profiles.toml"


def test_without_file_and_environment_it_is_this_machine(tmp_path):
    assert load_profile(environment={"OASST_CONFIG": str(tmp_path / "none")}) == Profile(address="127.0.0.1:50051")


def test_the_file_is_found_in_the_configuration_folder(path, tmp_path):
    (tmp_path / "oasst").mkdir()
    path.rename(tmp_path / "oasst" / "profiles.toml")
    assert load_profile(environment={"XDG_CONFIG_HOME": str(tmp_path)}).address == "home.example:1"


def test_variables_of_the_environment_come_on_top_of_the_profile_they_choose(path):
    environment = {"OASST_CONFIG": str(path), "OASST_PROFILE": "work", "OASST_API_KEY": "other", "OASST_TLS": "false"}
    profile = load_profile(environment=environment)
    assert (profile.address, profile.api_key, profile.tls) == ("work.example:443", "other", False)


def test_a_profile_that_is_named_is_taken_as_it_is(path):
    profile = load_profile("work", path=path, environment={"OASST_API_KEY": "other"})
    assert (profile.api_key, profile.tls, profile.tls_ca_file) == ("work-key", True, path.parent / "ca.pem")
    assert "work-key" not in repr(profile)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[default]\nadress = 'x'", r"\[default\] has the unknown key 'adress'; known are address, api_key"),
        ("[default]\ntls = 'yes'", r"tls of \[default\] must be a bool"),
        ("default = 1", r"default must be a table"),
        ("[default", "cannot be read"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_place(tmp_path, content, complaint):
    (tmp_path / "wrong.toml").write_text(content)
    with pytest.raises(ProfileError, match=complaint):
        load_profile(path=tmp_path / "wrong.toml", environment={})


@pytest.mark.parametrize(
    ("name", "environment", "complaint"),
    [
        ("play", {}, "there is no profile 'play' .* there is default, work"),
        (None, {"OASST_PROFILE": "play"}, "there is no profile 'play'"),
        (None, {"OASST_TLS": "maybe"}, "OASST_TLS must be one of"),
    ],
)
def test_what_cannot_be_meant_is_refused(path, name, environment, complaint):
    with pytest.raises(ProfileError, match=complaint):
        load_profile(name, path=path, environment=environment)


@pytest.mark.parametrize(
    ("profile", "complaint"),
    [
        (Profile(tls=True, tls_cert_file=Path("c.pem")), "needs cert and key"),
        (Profile(tls=True, tls_ca_file=Path("missing.pem")), r"missing\.pem cannot be read"),
        (Profile(address="chat.example:1", api_key="secret"), "would travel unencrypted"),
        (Profile(address="localhost:1,localhost:2"), "'localhost:1' is not IP:PORT: several .* by name give one"),
        (Profile(address="127.0.0.1:1,[::1]:2"), r"'\[::1\]:2' is not IP:PORT: .* all IPv4 or all \[IPv6\]"),
        (Profile(address="127.0.0.1:1,127.0.0.1"), "'127.0.0.1' is not IP:PORT"),
    ],
)
def test_what_no_connection_can_be_made_of_is_refused(profile, complaint):
    with pytest.raises(ProfileError, match=complaint):
        connect(profile)


def test_a_channel_of_an_address_that_is_none_is_refused_as_well():
    with pytest.raises(ProfileError, match="is not IP:PORT"):
        open_channel(Profile(address="localhost:1,localhost:2"))


def test_a_key_that_no_header_can_carry_is_refused_and_not_told():
    """As it comes from a file that ends with a line break."""
    with pytest.raises(ProfileError, match=r"the API key holds '\\n', which no header can carry") as error:
        connect(Profile(api_key="secret\n"))
    assert "secret" not in str(error.value)


async def test_both_clients_bring_the_key():
    with FakeServer() as server:
        profile = Profile(address=server.address, api_key="secret")
        with connect(profile) as client:
            client.chat("Hi")
        async with connect_async(profile) as async_client:
            await async_client.chat("Hi")
        assert [each["authorization"] for each in server.metadata] == ["Bearer secret"] * 2
