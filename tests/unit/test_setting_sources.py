"""Where settings come from, and which source counts."""

from __future__ import annotations

import itertools
import json
import logging

import pytest

from torchmgmt.errors import InvalidArgument, InvalidSetting
from torchmgmt.setting_sources import NOT_OURS
from torchmgmt.settings import Settings, declarations, gather

SNAPSHOT = r"""#Saving snapshot
#Mon Nov 23 09:00:00 UTC 2026
inference_address=http\://127.0.0.1\:8080
load_models=all
model_store=model_store
async_logging=true
number_of_gpu=0
job_queue_size=1000
python=/usr/bin/python3
model_snapshot={\n  "name"\: "20261123-startup.cfg",\n  "modelCount"\: 1,\n  "created"\: 1,\n  "models"\: {\n    "noop"\: {\n      "1.0"\: {\n        "defaultVersion"\: true,\n        "marName"\: "noop.mar",\n        "minWorkers"\: 2,\n        "maxWorkers"\: 2,\n        "batchSize"\: 1,\n        "maxBatchDelay"\: 100,\n        "responseTimeout"\: 120\n      }\n    }\n  }\n}
tsConfigFile=logs/config/20261123-startup.cfg
version=0.12.0
"""


@pytest.fixture
def write(tmp_path):
    """Write a config.properties; return its path."""

    def write(text: str):
        path = tmp_path / "config.properties"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("sources", [s for n in range(4) for s in itertools.combinations("fae", n)], ids="".join)
@pytest.mark.parametrize("enabled", [False, True])
def test_the_environment_counts_before_the_arguments_and_those_before_the_file(write, sources, enabled):
    """Of the sources that have a setting the first one counts; the environment only if it may."""
    values = {"f": 11, "a": 22, "e": 33}
    lines = [f"enable_envvars_config={str(enabled).lower()}", *(["job_queue_size=11"] if "f" in sources else [])]
    gathered = gather(
        {"job_queue_size": 22} if "a" in sources else {},
        file=write("\n".join(lines)),
        environment={"TS_JOB_QUEUE_SIZE": "33"} if "e" in sources else {},
    )
    counting = [source for source in "eaf" if source in sources and (enabled or source != "e")]
    assert gathered.settings.job_queue_size == (values[counting[0]] if counting else 100)
    is_ignored = "e" in sources and not enabled
    assert [w for w in gathered.warnings if "TS_JOB_QUEUE_SIZE" in w and "enable_envvars_config" in w] == list(
        gathered.warnings
    )
    assert bool(gathered.warnings) is is_ignored


@pytest.mark.parametrize(
    "arguments, environment, expected",
    [
        ({}, {}, False),
        ({"enable_envvars_config": True}, {}, True),
        ({}, {"TS_ENABLE_ENVVARS_CONFIG": "true"}, True),
        ({"enable_envvars_config": True}, {"TS_ENABLE_ENVVARS_CONFIG": "false"}, False),
    ],
)
def test_any_source_may_let_the_environment_count(arguments, environment, expected):
    """enable_envvars_config follows the same precedence as the rest."""
    settings = gather(arguments, environment={**environment, "TS_JOB_QUEUE_SIZE": "5"}).settings
    assert (settings.job_queue_size == 5) is expected


def test_two_settings_count_from_the_environment_at_once():
    """TorchServe documents TS_ENABLE_MODEL_API and TS_DISABLE_TOKEN_AUTHORIZATION without enable_envvars_config."""
    variables = {"TS_ENABLE_MODEL_API": "true", "TS_DISABLE_TOKEN_AUTHORIZATION": "false"}
    settings = gather({"enable_model_api": False}, environment=variables).settings
    assert (settings.enable_model_api, settings.disable_token_authorization) == (True, False)


@pytest.mark.parametrize("declaration", declarations(), ids=lambda one: one.name)
def test_every_setting_has_its_variable(declaration):
    """TS_ and the name in capitals; a blank one is as if it were not there."""
    assert declaration.environment_name == "TS_" + declaration.name.upper()
    gathered = gather(environment={"TS_ENABLE_ENVVARS_CONFIG": "1", declaration.environment_name: " "})
    assert gathered.settings == Settings(enable_envvars_config=declaration.name != "enable_envvars_config")


def test_a_blank_value_in_a_file_is_none(write):
    """A key without value leaves the default, also where it stood with one before."""
    gathered = gather(file=write("job_queue_size=5\nload_models=\njob_queue_size=\n"), environment={})
    assert gathered.settings == Settings()
    assert ["line 1 and in line 3" in warning for warning in gathered.warnings] == [True]


def test_a_snapshot_of_torchserve_is_read(write):
    """A file that TorchServe itself wrote gives its settings and the models of the snapshot."""
    settings = gather(file=write(SNAPSHOT), environment={}).settings
    assert settings.inference_address == "http://127.0.0.1:8080"
    assert (settings.load_models, settings.job_queue_size, settings.number_of_gpu) == (("all",), 1000, 0)
    assert settings.model_snapshot is not None
    assert settings.model_snapshot["models"]["noop"]["1.0"]["minWorkers"] == 2


def test_load_models_is_separated_by_commas(write):
    """Blanks around an item go, those in a name stay."""
    settings = gather(file=write("load_models=a.mar, b = b.mar ,my model.mar,"), environment={}).settings
    assert settings.load_models == ("a.mar", "b = b.mar", "my model.mar")


@pytest.mark.parametrize(
    "key, suggestion",
    [
        ("job_queue_sise", "did you mean 'job_queue_size'?"),
        ("jobQueueSize", "did you mean 'job_queue_size'?"),
        ("allowed-urls", "did you mean 'allowed_urls'?"),
        ("something_of_a_plugin", ""),
    ],
)
def test_an_unknown_key_is_kept_with_a_warning(write, key, suggestion):
    """It stops nothing; the warning names file, line and the nearest name that there is."""
    path = write(f"\n{key}=x")
    gathered = gather(file=path, environment={})
    assert gathered.settings.other_keys == {key: "x"}
    (warning,) = gathered.warnings
    assert warning.startswith(f"{path}, line 2: unknown setting {key!r}")
    assert warning.endswith(suggestion)


@pytest.mark.parametrize("key", NOT_OURS)
def test_a_key_that_only_torchserve_has_is_accepted_and_says_why_it_has_no_effect(write, key):
    """None of them is a setting of ours."""
    gathered = gather(file=write(f"{key}=1"), environment={})
    assert gathered.settings.other_keys == {key: "1"}
    assert [NOT_OURS[key] in warning for warning in gathered.warnings] == [True]
    assert key not in {declaration.name for declaration in declarations()}


def test_a_setting_that_nothing_uses_yet_says_so_when_it_is_set():
    """And only then: a default promises nothing."""
    idle = {one.name: one for one in declarations() if one.without_effect}
    assert gather({}, environment={}).warnings == ()
    warned = gather({"number_of_gpu": 2}, environment={}).warnings
    assert warned == (f"number_of_gpu has no effect in this release: {idle['number_of_gpu'].without_effect}",)


@pytest.mark.parametrize(
    "text, name, expected",
    [
        ("job_queue_size=many", "job_queue_size", "a whole number"),
        ("management_address=127.0.0.1:8081", "management_address", "an address such as"),
        ("management_address=http://127.0.0.1/\\\n  path", "management_address", "without path"),
        ("enable_model_api=yes", "enable_model_api", "true or false"),
        ("models={", "models", "a JSON object"),
        ("models=[1]", "models", "a JSON object"),
        ('models={"a": 1}', "models.a", "a JSON object of versions"),
        ('models={"a": {"1.0": []}}', "models.a.1.0", "a JSON object of parameters"),
        ('models={"a": {"1.0": {"minWorkers": -1}}}', "models.a.1.0.minWorkers", "at least 0"),
        ('models={"a": {"1.0": {"batchSize": "8"}}}', "models.a.1.0.batchSize", "a whole number"),
        ('models={"a": {"1.0": {"defaultVersion": 1}}}', "models.a.1.0.defaultVersion", "True or False"),
        ('models={"a": {"1.0": {"marName": 1}}}', "models.a.1.0.marName", "text"),
        ("model_snapshot=" + "[" * 100_000, "model_snapshot", "a JSON object"),
        ("allowed_urls=https://ok/.*,(", "allowed_urls", "a regular expression"),
        ("blacklist_env_vars=*", "blacklist_env_vars", "a regular expression"),
        ("token_expiration_min=0", "token_expiration_min", "at least 0.01"),
        ("keystore=keystore.p12", "keystore", "certificate_file and private_key_file"),
        ("contract=torchserve-0.11", "contract", "documented or torchserve-0.12"),
    ],
)
def test_a_wrong_value_names_file_line_and_setting(write, text, name, expected):
    """Also what was given and what is allowed."""
    path = write("# first\n\n" + text)
    with pytest.raises(InvalidSetting) as caught:
        gather(file=path, environment={})
    assert caught.value.argument == name
    assert str(caught.value).startswith(f"{path}, line 3: {name} is ")
    assert expected in str(caught.value)


def test_a_wrong_value_in_the_environment_names_the_variable():
    """As does a key store, which is refused wherever it stands."""
    for name, value in (("TS_JOB_QUEUE_SIZE", "x"), ("TS_KEYSTORE", "a.p12")):
        with pytest.raises(InvalidSetting, match=f"^the environment variable {name}: "):
            gather(environment={name: value, "TS_ENABLE_ENVVARS_CONFIG": "true"})


def test_a_key_store_is_refused_from_python_too():
    """It is nowhere silently ignored."""
    with pytest.raises(InvalidArgument, match="certificate_file"):
        Settings(keystore="x.p12")  # type: ignore[arg-type]


def test_a_program_reads_a_file_of_its_own(write, caplog):
    """Settings.from_file is what the server does, with the warnings in the log."""
    path = write('models={"a": {"1.0": {"minWorkers": 2}}}\njob_queue=1\nmodel_store=$$HOME$$')
    with caplog.at_level(logging.WARNING, "torchmgmt"):
        settings = Settings.from_file(path, environment={"HOME": "/models"})
    assert settings.models == {"a": {"1.0": {"minWorkers": 2}}}
    assert str(settings.model_store) == "/models"
    assert "job_queue_size" in caplog.text


def test_settings_share_nothing_with_what_they_were_made_of():
    """A dictionary that is changed later changes no settings; and they can be hashed."""
    models = {"a": {"1.0": {"minWorkers": 2}}}
    settings = Settings(models=models)
    models["a"]["1.0"]["minWorkers"] = 3
    assert json.dumps(settings.models) == '{"a": {"1.0": {"minWorkers": 2}}}'
    assert hash(settings) == hash(Settings(models=settings.models))
