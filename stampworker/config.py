"""Settings: frozen, checked once, secrets hidden.

Three sources, each over the one before it: a TOML file with a table per section, the environment
(``STAMPWORKER_<SECTION>_<KEY>``) and command-line flags. An unknown name is an error that names the nearest known one.
librdkafka's own properties stand in ``[kafka]`` under their dotted names, and in the environment as
``STAMPWORKER_KAFKA_`` and the name in capitals with underscores for dots.
"""

from __future__ import annotations

import difflib
import json
import re
import socket
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from stampworker.errors import ConfigError

PREFIX = "STAMPWORKER_"
PLANES = ("science", "template", "difference", "convolved", "error", "variance", "mask")
"""The planes that an alert may name."""

# Settings that were renamed, where the old name is not near the new one.
_RENAMED = {"verdict.needed": "min_delta_chi2", "verdict.point_gain": "max_point_delta_chi2"}
_KAFKA_ABOUT = "librdkafka's properties, shared by consumer and producer."
_SECRET = re.compile(r"password|passphrase|secret|jaas|token|\.pem$|oauthbearer\.config", re.IGNORECASE)


def _split(value: object) -> object:
    """Let a comma-separated string, or a list as `describe` prints it, stand for a list."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError as exc:
            raise ValueError(f'a list is written a,b or ["a", "b"]: {exc}') from None
    return [part.strip() for part in value.split(",") if part.strip()]


def _object(value: object) -> object:
    """Let a JSON object stand for a table, in the environment and in flags."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as exc:
        raise ValueError(f'a table is written {{"key": "value"}}: {exc}') from None


def _planes_only(value: Collection[str]) -> Collection[str]:
    for plane in value:
        if plane not in PLANES:
            raise ValueError(f"no plane is called {plane!r}{nearest(plane, PLANES)}")
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Planes = Annotated[Names, AfterValidator(_planes_only)]
Templates = Annotated[dict[str, str], BeforeValidator(_object), AfterValidator(_planes_only)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class EnrichSettings(_Section):
    """What goes into a packet."""

    radius: float = Field(31, gt=0, le=500)
    """Half-size of a stamp, pixels; a stamp is 2·ceil(radius) + 1 square."""
    required_planes: Planes = ()
    """Planes without which an alert is rejected: science, template, difference, convolved, error, variance, mask."""
    mask_ignore_flags: int = Field(0, ge=0, lt=1 << 63)
    """Bits of the mask that do not make a pixel bad, as a sum, for fit, noise and verdict; the mask's stamp keeps them.
    ZTF's masks want 2050: two of their bits mark detected sources."""
    gzip: bool = True
    """Compress the stamps (gzip)."""


class FitSettings(_Section):
    """How the convolved template is adjusted; see `stampworker.cutouts.adjust_cutout`."""

    max_shift: float = Field(1.0, gt=0, le=5)
    """Largest shift along x and along y, pixels."""
    max_scale: float = Field(1.1, gt=1, le=10)
    """Largest flux scale; the smallest is its inverse."""
    inner: int | None = Field(None, ge=3)
    """Side of the central box that is fitted, pixels; by default ceil(2·fwhm) made odd, at least 7."""
    fit_bg: bool = False
    """Fit the background offset too."""
    fwhm: float = Field(3.0, gt=0, le=100)
    """FWHM of the PSF where the alert has none, pixels."""


class VerdictSettings(_Section):
    """When a candidate is called an artefact; see `stampworker.cutouts.is_artefact`."""

    p_value: float = Field(0.01, ge=0, le=1)
    """The adjustment explains the residual where the p-value is above this, ..."""
    chi2_ratio: float = Field(0.33, ge=0, le=1)
    """... or chi2 is below this share of chi2_0."""
    min_scale: float = Field(0.8, gt=0, le=1)
    """Smallest scale of an artefact."""
    max_scale: float = Field(1.2, ge=1)
    """Largest scale of an artefact."""
    min_delta_chi2: float = Field(16.3, ge=0)
    """The adjustment was needed where chi2_0 − chi2 is above this (three parameters at 1e-3)."""
    max_point_delta_chi2: float = Field(12.0, ge=0)
    """No artefact where a point source lowers chi2 by more than this below a shift and scale of the template."""


class FrameSettings(_Section):
    """Which frames may be read, and how much of them is kept."""

    frame_roots: Names = ()
    """Folders, which must be there at the start, and URL prefixes (``https://host/path/``, ``s3://bucket/prefix/``,
    ``gs:``, ``abfs://container/prefix/``, ``memory:``) beneath which frames may be read; relative paths start at the
    first. Loopback and link-local addresses must be named themselves."""
    max_open_frames: int = Field(64, ge=1)
    """Frames kept open."""
    cache_bytes: int = Field(2 << 30, ge=0)
    """Data kept in memory, decompressed or from servers, bytes; for a batch at most half of it is fetched ahead."""
    max_header_bytes: int = Field(1 << 20, ge=2880)
    """Longest header of one HDU, bytes; all headers of a file together may have 32 times as many."""
    max_axis: int = Field(100_000, ge=1)
    """Longest axis of a frame, pixels."""
    max_decompressed_bytes: int = Field(1 << 30, ge=1)
    """Largest gzip file, decompressed as far as its HDUs go, and largest tile, bytes. One frame may take so much memory
    (a tile half as much again), prefetch_threads of them at a time, and is then kept within cache_bytes: a file of a
    few megabytes is enough."""
    max_download_bytes: int = Field(1 << 30, ge=1 << 16)
    """Most that is taken from a server in one answer, bytes: a stamp's rows; a whole file where it is gzip or the
    server serves no ranges."""
    max_alert_bytes: int = Field(8 << 30, ge=1 << 16)
    """Most that the stamps of one alert may need to be read from servers and decompressed, bytes: rows, tiles, and each
    gzip frame whole. By default more than the largest frame that the limits above let pass."""
    connect_s: float = Field(5.0, gt=0, le=300)
    """Longest wait for a connection to a server of frames, seconds."""
    read_s: float = Field(10.0, gt=0, le=300)
    """Longest silence of such a server, seconds."""
    total_s: float = Field(30.0, gt=0, le=3600)
    """Longest time that opening a frame, decompressing it included, or reading one section of a remote one may take,
    and all frames of one alert together, seconds."""
    failure_ttl_s: float = Field(5.0, ge=0, le=3600)
    """A remote frame that was missing or unavailable is not asked for again for so long, seconds; nor is any other of a
    server that cannot be connected to, or left three frames unanswered and answered nothing meanwhile. A server's own
    Retry-After may make it longer."""
    remote_ttl_s: float = Field(300.0, ge=0)
    """A remote frame is opened anew, and nothing kept of it used, when it was opened longer ago than this, seconds."""
    prefetch_threads: int = Field(8, ge=1, le=64)
    """Remote frames of a batch that are opened, then sections of them that are fetched, at a time."""
    s3_endpoint: str | None = Field(None, pattern=r"^https?://[^/?#@\s]+/?$")
    """Where ``s3:`` frames are, ``https://host:port``; by default the environment's AWS_ENDPOINT_URL, else Amazon.
    Credentials are always the environment's (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, a role)."""
    s3_region: str | None = None
    """Region of the buckets; by default the environment's AWS_REGION, else us-east-1."""
    s3_anonymous: bool = False
    """Read public buckets without credentials."""
    gs_endpoint: str | None = Field(None, pattern=r"^https?://[^/?#@\s]+/?$")
    """Where ``gs:`` frames are; by default the environment's GOOGLE_BASE_URL, else Google. Credentials are the
    environment's (GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_SERVICE_ACCOUNT, a machine's account)."""
    gs_anonymous: bool = False
    """Read Google's public buckets without credentials."""
    abfs_account: str | None = Field(None, pattern=r"^[a-z0-9]{3,24}$")
    """Azure's storage account, whose containers ``abfs://container/path`` names; by default the environment's
    AZURE_STORAGE_ACCOUNT_NAME. Credentials are the environment's (AZURE_STORAGE_ACCOUNT_KEY,
    AZURE_STORAGE_SAS_TOKEN, an identity)."""
    abfs_endpoint: str | None = Field(None, pattern=r"^https?://[^?#@\s]+$")
    """Where the account is, by default the environment's AZURE_STORAGE_ENDPOINT, else Azure."""
    abfs_anonymous: bool = False
    """Read Azure's public containers without credentials."""


class ResolveSettings(_Section):
    """Where the frames lie that an alert does not name; see `stampworker.resolve`."""

    resolver: str = Field("alert", min_length=1)
    """What says so: ``alert`` (nothing: alerts name their frames), ``template`` (the templates below), ``ztf`` (ZTF's
    archive, from pdiffimfilename), ``stdweb`` (the folder of an STDWeb task), or an entry point of the group
    stampworker.resolvers."""
    root: str = ""
    """Folder or URL prefix that {root} stands for in templates; it may hold fields, too. A relative one, or none,
    starts at the first of frame_roots, beneath which every frame must lie in any case."""
    planes: Planes = ()
    """Planes that are taken of the resolver's; by default ztf's science, template, difference, and all of others."""
    templates: Templates = Field(default_factory=dict)
    """Where a plane's frame lies, filled with the alert's fields and those of its extra, such as
    { difference = "{root}/{mjd:%Y%m%d}/{visit}-{ccd:02d}_diff.fits.fz#1" }: they stand over the resolver's own.
    JSON in the environment and in flags."""


class AlertSettings(_Section):
    """How incoming alerts are decoded."""

    schema_folder: Path | None = None
    """Folder of ``<schema id>.avsc``, for alerts in Confluent wire format."""


class WorkerSettings(_Section):
    """The loop: topics, group, batches, promise."""

    input_topic: Names = Field(("alerts",), min_length=1)
    """Topics that alerts are read from."""
    packet_topic: str = Field("packets", min_length=1)
    """Topic that packets are published to."""
    reject_topic: str = Field("rejects", min_length=1)
    """Topic that rejected alerts are published to."""
    retry_topic: str | None = Field(None, min_length=1)
    """Topic of the group's own in which alerts wait whose frames are missing or unavailable, to be tried again; without
    one they are rejected at once."""
    retry_delay_s: float = Field(30.0, gt=0, le=86_400)
    """Time between two attempts at an alert, seconds."""
    retry_missing_for_s: float = Field(600.0, ge=0)
    """A missing frame may only be late: an alert is tried again for so long after its first attempt, seconds."""
    retry_unavailable_for_s: float = Field(3600.0, ge=0)
    """The same for a frame that cannot be read now: a server that is down, busy or wants other credentials."""
    group: str = Field("stampworker", min_length=1)
    """Kafka consumer group."""
    slot: int | None = Field(None, ge=0)
    """Number of this worker in its group, for its transactional id; by default the host name's last digits, else 0."""
    guarantee: Literal["exactly-once", "at-least-once"] = "exactly-once"
    """At-least-once is for brokers without transactions."""
    batch_count: int = Field(200, ge=1)
    """A batch is closed at this many alerts, ..."""
    batch_bytes: int = Field(16 << 20, ge=1)
    """... at this many bytes of alerts, ..."""
    batch_s: float = Field(0.5, gt=0)
    """... or this long after its first alert, seconds."""
    transaction_timeout_s: float = Field(10.0, ge=1, le=900)
    """The broker aborts a transaction that stays open for longer, seconds; a crash may block readers so long."""
    deadline_s: float = Field(60.0, gt=0, le=240)
    """Longest time for publishing and committing one batch, seconds; below the group's poll interval of 300 s."""

    @model_validator(mode="after")
    def _no_loop(self) -> Self:
        for name in ("packet_topic", "reject_topic", "retry_topic"):
            if getattr(self, name) in self.input_topic:
                raise ValueError(f"{name} is an input topic, too: the worker would read what it writes")
        if self.retry_topic in (self.packet_topic, self.reject_topic):
            raise ValueError(f"retry_topic is the topic of packets or rejects, too: {self.retry_topic!r}")
        return self

    def slot_number(self) -> int:
        """Return the slot as set, else the number that the host's name ends in (a StatefulSet's ordinal), else 0."""
        if self.slot is not None:
            return self.slot
        found = re.search(r"(\d{1,6})$", socket.gethostname().split(".")[0])
        return int(found[1]) if found else 0

    def transactional_id(self) -> str:
        """Return ``<group>-<slot>``: stable, so that a restarted worker ends what it left open."""
        return f"{self.group}-{self.slot_number()}"


class LogSettings(_Section):
    """What is logged, to standard error."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severity that is logged."""


class Settings(_Section):
    """Every setting of a run."""

    enrich: EnrichSettings = EnrichSettings()
    fit: FitSettings = FitSettings()
    verdict: VerdictSettings = VerdictSettings()
    frames: FrameSettings = FrameSettings()
    resolve: ResolveSettings = ResolveSettings()
    alerts: AlertSettings = AlertSettings()
    worker: WorkerSettings = WorkerSettings()
    log: LogSettings = LogSettings()
    kafka: dict[str, str] = Field(default_factory=lambda: {"bootstrap.servers": "localhost:9092"}, repr=False)
    """librdkafka's properties, shared by consumer and producer."""

    @field_validator("kafka", mode="before")
    @classmethod
    def _strings(cls, value: object) -> object:
        # TOML has numbers and booleans; librdkafka takes strings.
        if not isinstance(value, Mapping):
            return value
        if not all(value):
            raise ValueError("a property has no name")
        return {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in value.items()}


def _without_credentials(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//********@", text)


def nearest(name: str, known: object) -> str:
    """Return ``; the nearest known is …``, or nothing where none is near."""
    found = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.6)  # type: ignore[attr-defined]
    return f"; the nearest known is {found[0]!r}" if found else ""


def load(
    path: Path | None = None, environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None
) -> Settings:
    """Read and check the settings.

    Parameters
    ----------
    path : Path, optional
        A TOML file.
    environ : mapping, optional
        The environment; only names that start with ``STAMPWORKER_`` count, without ``STAMPWORKER_TEST_*`` (the tests')
        and ``STAMPWORKER_CONFIG`` (the path of the file, see the command line).
    flags : mapping, optional
        ``section.key`` → value; ``kafka.<name>`` for librdkafka's properties. They win.

    Returns
    -------
    settings : Settings

    Raises
    ------
    ConfigError
        The file cannot be read, a name is unknown, or a value is not what is wanted.
    """
    values: dict[str, dict[str, object]] = {}
    for section, keys in _read_toml(path).items() if path else ():
        if not isinstance(keys, dict):
            if section in Settings.model_fields:
                raise ConfigError(f"{path}: {section!r} is a section, wanted a table [{section}]")
            raise ConfigError(f"{path}: {section!r} stands outside a section")
        values[section] = {**_flatten(keys)} if section == "kafka" else dict(keys)
    sources = {f"{s}.{k}": str(path) for s, keys in values.items() for k in keys}
    for name, value in (environ or {}).items():
        if name.startswith(PREFIX) and not name.startswith(PREFIX + "TEST_") and name != PREFIX + "CONFIG":
            section, key = _environment_key(name)
            values.setdefault(section, {})[key] = value
            sources[f"{section}.{key}"] = name
    for dotted, given in (flags or {}).items():
        section, _, key = dotted.partition(".")
        values.setdefault(section, {})[key] = given
        sources[dotted] = "command line"
    kafka = {"bootstrap.servers": "localhost:9092", **values.pop("kafka", {})}
    try:
        return Settings.model_validate({**values, "kafka": kafka})
    except ValidationError as exc:
        raise ConfigError("\n".join(_complaint(error, sources) for error in exc.errors())) from None


def describe(settings: Settings) -> str:
    """Return the settings as TOML, each with a comment that says what it does; secrets are masked.

    Parameters
    ----------
    settings : Settings

    Returns
    -------
    text : str
        What `load` reads.
    """
    lines = []
    for section, values in settings.model_dump(mode="json").items():
        about = type(getattr(settings, section)).__doc__ if section != "kafka" else _KAFKA_ABOUT
        lines += [f"[{section}]", f"# {(about or '').splitlines()[0]}"]
        for key, value in values.items():
            what = _sections()[section].model_fields[key].description if section != "kafka" else None
            if what:
                lines += ["", *(f"# {line}" for line in what.splitlines())]
            name = json.dumps(key) if section == "kafka" else key
            shown = "********" if section == "kafka" and _SECRET.search(key) else value
            written = _without_credentials(_toml(shown))
            lines.append(f"# {name} is not set" if shown is None else f"{name} = {written}")
        lines.append("")
    return "\n".join(lines)


def _toml(value: object) -> str:
    """Write a value as TOML: JSON's strings, numbers, booleans and lists are TOML's too; TOML has no null."""
    if isinstance(value, Mapping):  # its keys are names of ours
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc


def _flatten(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Undo TOML's reading of an unquoted dotted key as nested tables."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _environment_key(name: str) -> tuple[str, str]:
    section, _, key = name.removeprefix(PREFIX).lower().partition("_")
    if section == "kafka":
        return section, key.replace("_", ".")
    known = [f"{PREFIX}{s}_{k}".upper() for s, model in _sections().items() for k in model.model_fields]
    if name not in known:
        current = _RENAMED.get(f"{section}.{key}")
        hint = nearest(f"{PREFIX}{section}_{current}".upper() if current else name, known)
        raise ConfigError(f"environment: {name} is not a setting{hint}")
    return section, key


def _sections() -> dict[str, type[_Section]]:
    return {name: type(value) for name, value in Settings() if isinstance(value, _Section)}


def _complaint(error: Any, sources: Mapping[str, str]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    key = ".".join(str(part) for part in error["loc"][:2])
    source = sources.get(key) or next((s for name, s in sources.items() if name.startswith(f"{key}.")), None)
    prefix = f"{source}: {where}" if source else where
    if error["type"] != "extra_forbidden":
        # Not the input of a whole section: it may hold secrets, and the message says what is wrong.
        found = "" if isinstance(error["input"], Mapping) else f"found {_without_credentials(repr(error['input']))}; "
        problem = error["msg"].removeprefix("Value error, ")
        return f"{prefix}: {found}{problem[0].lower()}{problem[1:]}"
    section, *rest = error["loc"]
    known = _sections()[section].model_fields if rest else Settings.model_fields
    name = _RENAMED.get(where, str(error["loc"][-1]))
    return f"{prefix} is not a setting{nearest(name, known)}"
