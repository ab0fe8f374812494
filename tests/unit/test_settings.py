"""The declaration of the settings, and the command line made from it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmgmt.errors import InvalidArgument
from torchmgmt.http.flags import add_settings, given_settings
from torchmgmt.settings import Address, Settings, declarations, is_loopback_host

TEXTS = {
    "model_store": "store",
    "load_models": "a.mar,b=c.mar",
    "inference_address": "http://127.0.0.1:9090",
    "management_address": "http://127.0.0.1:0",
    "default_workers_per_model": "2",
    "job_queue_size": "7",
    "default_response_timeout": "2.5",
    "default_startup_timeout": "3",
    "unregister_model_timeout": "0",
    "max_retry_timeout": "1",
    "enable_model_api": "TRUE",
    "disable_token_authorization": "0",
    "max_request_size": "1000",
    "log_level": "debug",
    "cache_dir": "cache",
    "max_cache_size": "1000",
    "max_archive_size": "1000",
    "download_timeout": "10",
    "download_stall_timeout": "1.5",
    "on_give_up": "Exit",
    "share_weights": "never",
    "threads_per_worker": "2",
    "batches_in_flight": "1",
    "max_requests": "1000",
    "max_memory": "1000000",
    "isolate_errors": "true",
    "decode_input_request": "false",
    "show_handler_errors": "true",
    "cancel_running": "Now",
    "scale_down_delay": "1.5",
    "template_idle_timeout": "0",
    "models": '{"a": {"1.0": {"minWorkers": 1}}}',
    "model_snapshot": '{"name": "x", "models": {}}',
    "state_dir": "elsewhere",
    "no_config_snapshots": "true",
    "metrics_address": "http://127.0.0.1:0",
    "enable_metrics_api": "false",
    "disable_system_metrics": "true",
    "tracing": "Off",
    "certificate_file": "cert.pem",
    "private_key_file": "key.pem",
    "token_expiration_min": "0.5",
    "contract": "TorchServe-0.12",
    "allowed_urls": "https://a.org/.*, file:///x",
    "cors_allowed_origin": "https://example.org",
    "cors_allowed_methods": "GET, POST",
    "cors_allowed_headers": "X-One X-Two",
    "max_response_size": "1000",
    "number_of_gpu": "0",
    "blacklist_env_vars": ".*USERNAME.*|.*PASSWORD.*",
    "install_py_dep_per_model": "true",
    "install_py_dep_timeout": "90",
    "service_envelope": "json",
    "enable_envvars_config": "true",
}
READABLE = [one for one in declarations() if one.name != "keystore"]
WITH_FLAG = [one for one in READABLE if one.all_flags]


def parse(*arguments: str) -> Settings:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_settings(parser)
    return Settings(**given_settings(parser.parse_args(list(arguments))))


def test_the_defaults_are_the_contracts():
    """What nobody says is what TorchServe's documentation says, and nothing is open that need not be."""
    settings = Settings()
    assert settings.inference_address == "http://127.0.0.1:8080"
    assert settings.management_address == "http://127.0.0.1:8081"
    assert (settings.job_queue_size, settings.max_request_size) == (100, 6553500)
    assert settings.default_response_timeout == settings.default_startup_timeout == 120
    assert (settings.unregister_model_timeout, settings.max_retry_timeout) == (120, 300)
    assert (settings.share_weights, settings.on_give_up) == ("auto", "stay")
    assert settings.threads_per_worker is settings.max_requests is settings.max_memory is None
    assert settings.enable_model_api is False
    assert settings.model_store is settings.default_workers_per_model is None
    assert settings.disable_token_authorization is None
    assert settings.load_models == ()


@pytest.mark.parametrize("declaration", READABLE, ids=lambda one: one.name)
def test_every_setting_can_be_read_from_text(declaration):
    """A setting's text gives a value that Settings keeps as it is."""
    value = declaration.parse(TEXTS[declaration.name])
    assert value != declaration.default
    assert getattr(Settings(**{declaration.name: value}), declaration.name) == value


@pytest.mark.parametrize("declaration", WITH_FLAG, ids=lambda one: one.name)
def test_a_setting_means_the_same_from_text_and_from_its_own_flag(declaration):
    """A setting's text means the same in whatever source it stands."""
    text = TEXTS[declaration.name]
    value = declaration.parse(text)
    from_flag = parse(declaration.all_flags[0], text)
    assert getattr(from_flag, declaration.name) == value
    assert from_flag == Settings(**{declaration.name: value})


@pytest.mark.parametrize("declaration", WITH_FLAG, ids=lambda one: one.name)
def test_every_setting_is_in_the_help(declaration):
    """--help shows each setting with its unit and default."""
    parser = argparse.ArgumentParser()
    add_settings(parser)
    text = " ".join(parser.format_help().split())
    assert declaration.all_flags[0] in text
    assert " ".join(declaration.help.split()) in text


@pytest.mark.parametrize(
    "name, value",
    [
        ("job_queue_size", 0),
        ("job_queue_size", True),
        ("job_queue_size", 1.5),
        ("default_workers_per_model", -1),
        ("default_response_timeout", 0),
        ("default_startup_timeout", float("nan")),
        ("unregister_model_timeout", -1),
        ("max_retry_timeout", float("inf")),
        ("enable_model_api", "yes"),
        ("disable_token_authorization", 1),
        ("max_request_size", 0),
        ("model_store", ""),
        ("model_store", 3),
        ("load_models", [1]),
        ("log_level", "LOUD"),
        ("management_address", "127.0.0.1:8081"),
        ("management_address", "http://:8081"),
        ("management_address", "http://localhost:99999"),
        ("management_address", "http://localhost:8081/models"),
        ("inference_address", "unix:/tmp/socket"),
        ("inference_address", None),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    """A wrong value names its setting, what was given and what is allowed."""
    with pytest.raises(InvalidArgument) as caught:
        Settings(**{name: value})
    assert caught.value.argument == name
    assert caught.value.given is value
    assert str(caught.value).startswith(f"{name} is ")


def test_a_wrong_text_on_the_command_line_names_the_flag():
    """argparse hands on which setting was wrong and what is allowed."""
    with pytest.raises(argparse.ArgumentError, match=r"--job-queue-size.*at least 1"):
        parse("--job-queue-size", "many")


def test_torchserves_flags_mean_our_settings():
    """TorchServe's --models and --disable-token-auth are other names of our settings."""
    settings = parse("--models", "a.mar,b.mar", "c=d.mar", "--disable-token-auth")
    assert settings.load_models == ("a.mar", "b.mar", "c=d.mar")
    assert settings.disable_token_authorization is True


def test_a_flag_without_value_switches_on():
    """--enable-model-api needs no value, and takes one."""
    assert parse("--enable-model-api").enable_model_api is True
    assert parse("--enable-model-api", "false").enable_model_api is False


def test_a_path_may_be_text():
    """A model store may be given as text; it is kept as a path."""
    assert Settings(model_store="x").model_store == Path("x")


@pytest.mark.parametrize(
    "text, address",
    [
        ("http://127.0.0.1:8081", Address("http", "127.0.0.1", 8081)),
        ("http://[::1]:0/", Address("http", "::1", 0)),
        ("https://example.org", Address("https", "example.org", 443)),
        (" HTTP://localhost:1 ", Address("http", "localhost", 1)),
    ],
)
def test_an_address_survives_being_written(text, address):
    """Reading, writing and reading an address again gives the same."""
    assert Address.parse("x", text) == address
    assert Address.parse("x", str(address)) == address


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_names_are_loopback(host):
    """Only this machine answers to these."""
    assert is_loopback_host(host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "example.org", "localhost.evil.org", "1.2.3.4"])
def test_other_names_are_not_loopback(host):
    """A name that merely looks local is not trusted."""
    assert not is_loopback_host(host)


@given(st.text())
def test_any_text_is_an_address_or_an_invalid_argument(text):
    """No text makes reading an address fail in another way."""
    try:
        address = Address.parse("x", text)
    except InvalidArgument:
        return
    assert 0 <= address.port <= 65535
