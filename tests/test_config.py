"""Settings: four sources in order, unknown names, bounds, secrets."""

import tomllib

import pytest
from pydantic import ValidationError

from stampworker.config import EnrichSettings, Settings, WorkerSettings, describe, load
from stampworker.errors import ConfigError

SECRETS = (
    "sasl.password",
    "ssl.key.password",
    "ssl.keystore.password",
    "ssl.key.pem",
    "sasl.oauthbearer.client.secret",
    "sasl.oauthbearer.assertion.private.key.passphrase",
    "sasl.oauthbearer.config",
    "sasl.jaas.config",
)


@pytest.fixture
def toml(tmp_path):
    """Return a function that writes a configuration and gives its path."""

    def write(text):
        path = tmp_path / "stampworker.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_defaults_are_those_of_the_interface():
    """The defaults are the fit of the interface note and a local broker."""
    settings = load()
    assert settings == Settings()
    assert settings.enrich.radius == 31
    assert (settings.fit.max_shift, settings.fit.max_scale, settings.fit.inner, settings.fit.fit_bg) == (
        1,
        1.1,
        None,
        False,
    )
    verdict = settings.verdict
    assert (verdict.p_value, verdict.chi2_ratio, verdict.min_delta_chi2) == (0.01, 0.33, 16.3)
    assert (verdict.min_scale, verdict.max_scale) == (0.8, 1.2)
    assert settings.frames.frame_roots == ()
    assert settings.kafka == {"bootstrap.servers": "localhost:9092"}


def test_file_then_environment_then_flags(toml):
    """The environment overrides the file and flags override both, key by key."""
    path = toml('[enrich]\nradius = 10\ngzip = false\n[fit]\nfwhm = 4\n[kafka]\n"linger.ms" = 1\n')
    environ = {"STAMPWORKER_ENRICH_RADIUS": "20", "STAMPWORKER_FIT_FWHM": "5", "STAMPWORKER_KAFKA_LINGER_MS": "2"}
    settings = load(path, environ, {"enrich.radius": "30", "kafka.linger.ms": "3"})
    assert (settings.enrich.radius, settings.enrich.gzip, settings.fit.fwhm) == (30, False, 5)
    assert settings.kafka == {"bootstrap.servers": "localhost:9092", "linger.ms": "3"}


def test_kafka_properties_are_strings_by_their_dotted_names(toml):
    """Quoted or not, numbers, booleans and nested tables of TOML become librdkafka's dotted strings."""
    path = toml(
        '[kafka]\nbootstrap.servers = "a:1,b:2"\n"socket.keepalive.enable" = true\nsasl.username = "u"\nretries = 7\n'
    )
    assert load(path).kafka == {
        "bootstrap.servers": "a:1,b:2",
        "socket.keepalive.enable": "true",
        "sasl.username": "u",
        "retries": "7",
    }


def test_environment_of_others_is_left_alone():
    """Names without the prefix, those of the tests and the path of the file are not settings."""
    environ = {"PATH": "/bin", "STAMPWORKER_TEST_BROKER": "x", "STAMPWORKER_CONFIG": "y", "XSTAMPWORKER_FIT_FWHM": "z"}
    assert load(None, environ) == Settings()


def test_lists_come_as_lists_or_between_commas(toml):
    """A list of names may be a TOML list, or one string with commas."""
    path = toml('[frames]\nframe_roots = ["/a", "/b"]\n')
    environ = {"STAMPWORKER_WORKER_INPUT_TOPIC": "one, two"}
    settings = load(path, environ, {"enrich.required_planes": "mask,error"})
    assert settings.frames.frame_roots == ("/a", "/b")
    assert settings.worker.input_topic == ("one", "two")
    assert settings.enrich.required_planes == ("mask", "error")


def test_tables_come_as_tables_or_as_json(toml):
    """Templates are a table in the file and JSON elsewhere; an error names an unknown plane."""
    path = toml('[resolve.templates]\nscience = "{root}/{night}.fits"\n')
    assert load(path).resolve.templates == {"science": "{root}/{night}.fits"}
    environ = {"STAMPWORKER_RESOLVE_TEMPLATES": '{"mask": "m"}'}
    assert load(path, environ).resolve.templates == {"mask": "m"}
    assert load(path, environ, {"resolve.templates": "{}"}).resolve.templates == {}
    for text, message in (
        ('{"scince": "s"}', "resolve.templates: .*no plane is called 'scince'; the nearest known is 'science'"),
        ("{science: s}", 'a table is written {"key": "value"}'),
        ('{"science": 5}', "resolve.templates.science: found 5"),
        ('["science"]', "resolve.templates: .*valid dictionary"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(flags={"resolve.templates": text})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[enrich]\nradus = 3\n", r"enrich\.radus is not a setting; the nearest known is 'radius'"),
        ("[wroker]\ngroup = 'g'\n", r"wroker is not a setting; the nearest known is 'worker'"),
        ("worker = 3\n", r"'worker' is a section, wanted a table \[worker\]"),
        ("radius = 3\n", "'radius' is outside a section"),
        (
            "[enrich]\nrequired_planes = ['tempalte']\n",
            r"no plane is called 'tempalte'; the nearest known is 'template'",
        ),
        ("[fit]\nzzz = 1\n", r"fit\.zzz is not a setting$"),
    ],
)
def test_unknown_names_in_the_file_name_the_nearest(toml, text, message):
    """A typing error is an error that names the file and the nearest known name."""
    path = toml(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value) or "wroker" in text


def test_unknown_names_in_the_environment_and_in_flags_name_the_nearest():
    """A typing error in the environment or in a flag names its source and the nearest known name."""
    with pytest.raises(ConfigError, match=r"STAMPWORKER_WORKER_GRUOP is not a setting.*'STAMPWORKER_WORKER_GROUP'"):
        load(None, {"STAMPWORKER_WORKER_GRUOP": "g"})
    with pytest.raises(ConfigError, match=r"STAMPWORKER_WORKER is not a setting"):
        load(None, {"STAMPWORKER_WORKER": "g"})
    with pytest.raises(ConfigError, match=r"command line: fit\.max_shfit is not a setting.*'max_shift'"):
        load(None, {}, {"fit.max_shfit": "1"})


@pytest.mark.parametrize(
    "flag",
    [
        ("enrich.mask_ignore_flags", "-1"),
        ("enrich.mask_ignore_flags", str(1 << 63)),
        ("enrich.radius", "0"),
        ("enrich.radius", "501"),
        ("enrich.radius", "nan"),
        ("enrich.radius", "wide"),
        ("fit.max_shift", "0"),
        ("fit.max_scale", "1"),
        ("fit.inner", "2"),
        ("fit.fit_bg", "perhaps"),
        ("fit.fwhm", "-1"),
        ("verdict.min_delta_chi2", "inf"),
        ("verdict.p_value", "1.5"),
        ("frames.max_open_frames", "0"),
        ("worker.batch_count", "0"),
        ("worker.slot", "-1"),
        ("worker.guarantee", "at-most-once"),
        ("worker.group", ""),
        ("worker.input_topic", ""),
        ("worker.packet_topic", ""),
        ("log.level", "LOUD"),
    ],
)
def test_values_out_of_bounds_name_setting_value_and_source(flag):
    """A value out of bounds is an error that names the setting, the value and its source."""
    name, value = flag
    with pytest.raises(ConfigError, match=rf"^command line: {name}: found .*; ") as caught:
        load(None, {}, {name: value})
    assert value in str(caught.value)


def test_every_fault_is_told_at_once():
    """Two wrong settings give two lines."""
    with pytest.raises(ConfigError, match="radius") as caught:
        load(None, {}, {"enrich.radius": "-1", "fit.fwhm": "0"})
    assert len(str(caught.value).splitlines()) == 2


def test_worker_does_not_read_what_it_writes():
    """An output topic among the input topics is refused."""
    for name in ("packet_topic", "reject_topic"):
        with pytest.raises(ConfigError, match=f"{name} is an input topic, too"):
            load(None, {}, {"worker.input_topic": "a,b", f"worker.{name}": "b"})


def test_file_that_cannot_be_read(tmp_path, toml):
    """A missing file, a folder, and what is not TOML are named."""
    with pytest.raises(ConfigError, match=r"absent\.toml: .*No such file"):
        load(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"stampworker\.toml: "):
        load(toml("[enrich\n"))
    latin = toml("")
    latin.write_bytes(b"# \xe9\n")
    with pytest.raises(ConfigError, match="utf-8"):
        load(latin)


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_masked(toml, name):
    """The description, repr and str show no password, key or token."""
    settings = load(toml(f'[kafka]\n"{name}" = "hunter2"\n'))
    assert settings.kafka[name] == "hunter2"
    assert f'"{name}" = "********"' in describe(settings)
    assert not any("hunter2" in text for text in (describe(settings), repr(settings), str(settings)))


def test_secrets_stay_out_of_error_messages(toml):
    """No error message shows the value of a property."""
    for text in (
        '[kafka]\n"sasl.password" = "hunter2"\n"" = "x"\n',
        '[kafak]\n"sasl.password" = "hunter2"\n',
        '[kafka]\n"sasl.password" = "hunter2"\n[enrich]\nradius = -1\n',
    ):
        with pytest.raises(ConfigError, match=r"kafak|no name|radius") as caught:
            load(toml(text))
        assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError, match="no name") as caught:
        load(None, {"STAMPWORKER_KAFKA": "hunter2"})
    assert "hunter2" not in str(caught.value)


def test_description_is_a_configuration(toml):
    """The description is read as the same settings; a setting without a value is a comment."""
    settings = load(
        None,
        {},
        {
            "enrich.required_planes": "mask",
            "verdict.min_delta_chi2": "1e-7",
            "kafka.client.id": 'π "quoted" \\',
            "fit.inner": "9",
            "resolve.templates": '{"science": "{root}/\\"π\\".fits#1", "mask": "m"}',
        },
    )
    text = describe(settings)
    assert load(toml(text)) == settings
    assert settings.resolve.templates == {"science": '{root}/"π".fits#1', "mask": "m"}
    assert tomllib.loads(text)["kafka"]["client.id"] == 'π "quoted" \\'
    assert "# slot is not set" in text


def test_settings_are_frozen():
    """A setting cannot be changed."""
    with pytest.raises(ValidationError, match="frozen"):
        Settings().enrich.radius = 3  # type: ignore[misc]  # the types forbid it too
    with pytest.raises(ValidationError, match="Extra inputs"):
        EnrichSettings(radios=3)  # type: ignore[call-arg]  # the types forbid it too


@pytest.mark.parametrize(
    ("host", "slot"),
    [("stampworker-3", 3), ("worker-12.pods.local", 12), ("node7.example", 7), ("laptop", 0), ("a-9-b", 0)],
)
def test_slot_is_the_number_that_the_host_name_ends_in(monkeypatch, host, slot):
    """A StatefulSet's ordinal is the slot, unless one is set; the transactional id is stable."""
    monkeypatch.setattr("socket.gethostname", lambda: host)
    assert WorkerSettings(group="g").transactional_id() == f"g-{slot}"
    assert WorkerSettings(group="g", slot=5).transactional_id() == "g-5"


def test_list_as_it_is_printed_is_a_list():
    """A list as `describe` prints it is a value for a flag or the environment; half a list is an error."""
    assert load(flags={"frames.frame_roots": '["a", "b,c"]'}).frames.frame_roots == ("a", "b,c")
    with pytest.raises(ConfigError, match="a list is written a,b"):
        load(flags={"frames.frame_roots": '["a"'})


def test_credentials_in_a_root_are_not_shown():
    """The description masks a password in a URL."""
    flags = {"frames.frame_roots": "https://user:hunter2@host/x/", "resolve.root": "https://user:hunter2@host/y"}
    text = describe(load(flags=flags | {"resolve.templates": '{"mask": "https://user:hunter2@host/m"}'}))
    assert "hunter2" not in text
    assert "https://********@host/x/" in text


def test_section_that_is_unknown_names_its_file(tmp_path):
    """The error names the file."""
    path = tmp_path / "worker.toml"
    path.write_text("[fitt]\nmax_shift = 2\n")
    with pytest.raises(ConfigError, match=r"worker\.toml: fitt is not a setting; the nearest known is 'fit'"):
        load(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("verdict.needed", "min_delta_chi2"),
        ("verdict.point_gain", "max_point_delta_chi2"),
        ("enrich.mask_ignore", "mask_ignore_flags"),
        ("frames.failure_age_s", "failure_ttl_s"),
        ("frames.remote_age_s", "remote_ttl_s"),
        ("worker.retry_missing_s", "retry_missing_for_s"),
        ("worker.retry_unavailable_s", "retry_unavailable_for_s"),
    ],
)
def test_a_setting_by_its_old_name_names_the_new_one(old, new):
    """An old name, in a flag or in the environment, gives an error with the new name."""
    with pytest.raises(ConfigError, match=f"{old} is not a setting; the nearest known is '{new}'"):
        load(flags={old: "1"})
    section = old.partition(".")[0].upper()
    name = f"STAMPWORKER_{old.replace('.', '_').upper()}"
    with pytest.raises(ConfigError, match=f"{name} is not a setting; .* 'STAMPWORKER_{section}_{new.upper()}'"):
        load(environ={name: "1"})
