"""Settings: frozen, checked once, secrets hidden.

They come from a TOML file with a table per section, from the environment (``STAMPWORKER_<SECTION>_<KEY>``) and from
command-line flags; each source overrides the one before it. An unknown name is an error that names the nearest known
one. librdkafka's properties are in ``[kafka]`` under their dotted names. In the environment their prefix is
``STAMPWORKER_KAFKA_``, in capitals and with underscores instead of dots.
"""

from __future__ import annotations

import difflib
import json
import re
import socket
import tomllib
from collections.abc import Collection, Iterable, Mapping
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

# Settings that were renamed and whose old name is not similar to the new one.
_RENAMED = {"verdict.needed": "min_delta_chi2", "verdict.point_gain": "max_point_delta_chi2"}
_SECRET = re.compile(r"password|passphrase|secret|jaas|token|\.pem$|oauthbearer\.config", re.IGNORECASE)


def _split(value: object) -> object:
    """Turn text into a list: names between commas, or a list as `describe` prints it."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return _from_json(value, 'a list is written a,b or ["a", "b"]')
    return [part.strip() for part in value.split(",") if part.strip()]


def _object(value: object) -> object:
    """Turn a JSON object, in the environment and in flags, into a table."""
    return _from_json(value, 'a table is written {"key": "value"}') if isinstance(value, str) else value


def _from_json(text: str, example: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as exc:
        raise ValueError(f"{example}: {exc}") from None


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
    """The content of a packet."""

    radius: float = Field(31, gt=0, le=500)
    """Half-size of a stamp, pixels. A stamp is a square of 2·ceil(radius) + 1 pixels."""
    required_planes: Planes = ()
    """An alert without one of these planes is rejected. Planes: science, template, difference, convolved, error,
    variance, mask."""
    mask_ignore_flags: int = Field(0, ge=0, lt=1 << 63)
    """Sum of the mask bits that do not make a pixel bad in fit, noise and verdict. The mask's stamp keeps them. For
    ZTF's masks set 2050: two of their bits mark detected sources."""
    gzip: bool = True
    """Compress the stamps with gzip."""


class FitSettings(_Section):
    """How the convolved template is adjusted; see `stampworker.cutouts.adjust_cutout`."""

    max_shift: float = Field(1.0, gt=0, le=5)
    """Largest shift along x and largest along y, pixels."""
    max_scale: float = Field(1.1, gt=1, le=10)
    """Largest flux scale. The smallest is its inverse."""
    inner: int | None = Field(None, ge=3)
    """Side of the fitted box in the middle of the stamp, pixels. By default ceil(2·fwhm), made odd, at least 7."""
    fit_bg: bool = False
    """Fit the background offset too."""
    fwhm: float = Field(3.0, gt=0, le=100)
    """FWHM of the PSF for alerts that give none, pixels."""


class VerdictSettings(_Section):
    """Thresholds of the verdict that a candidate is an artefact; see `stampworker.cutouts.is_artefact`."""

    p_value: float = Field(0.01, ge=0, le=1)
    """The adjustment explains the residual if the p-value is above this, or by chi2_ratio."""
    chi2_ratio: float = Field(0.33, ge=0, le=1)
    """The adjustment explains the residual if chi2 is below this fraction of chi2_0, or by p_value."""
    min_scale: float = Field(0.8, gt=0, le=1)
    """Smallest flux scale of an artefact."""
    max_scale: float = Field(1.2, ge=1)
    """Largest flux scale of an artefact."""
    min_delta_chi2: float = Field(16.3, ge=0)
    """The adjustment was needed if chi2_0 − chi2 is above this. The default is the level 1e-3 for three parameters."""
    max_point_delta_chi2: float = Field(12.0, ge=0)
    """Not an artefact if a point source fits better than the adjusted template by more than this in chi2."""


class FrameSettings(_Section):
    """Which frames may be read, and the limits of time and memory."""

    frame_roots: Names = ()
    """Folders and URL prefixes (``https://host/path/``, ``s3://bucket/prefix/``, ``gs:``, ``abfs://container/prefix/``,
    ``memory:``) beneath which frames may be read. Relative paths start at the first. Folders must exist when the
    program starts. Loopback and link-local addresses are refused unless they are named here."""
    max_open_frames: int = Field(64, ge=1)
    """Largest number of open frames."""
    cache_bytes: int = Field(2 << 30, ge=0)
    """Memory for data from servers and decompressed data, bytes. At most half of it is for prefetching a batch."""
    max_header_bytes: int = Field(1 << 20, ge=2880)
    """Longest header of one HDU, bytes. All headers of a file together may be 32 times as long."""
    max_axis: int = Field(100_000, ge=1)
    """Longest axis of a frame, pixels."""
    max_decompressed_bytes: int = Field(1 << 30, ge=1)
    """Largest decompressed gzip file and largest decompressed tile, bytes. Even a file of a few megabytes can need this
    much memory while it is read (a tile 1.5 times as much), and prefetch_threads files are read at the same time."""
    max_download_bytes: int = Field(1 << 30, ge=1 << 16)
    """Largest answer of a server, bytes. An answer has the rows of a stamp, or the whole file if it is a gzip file or
    if the server has no ranges."""
    max_alert_bytes: int = Field(8 << 30, ge=1 << 16)
    """Most data that may be read from servers and decompressed for the stamps of one alert, bytes: rows, tiles and
    whole gzip files. The default is above the largest frame that the other limits allow."""
    connect_s: float = Field(5.0, gt=0, le=300)
    """Longest wait for a connection to a server of frames, seconds."""
    read_s: float = Field(10.0, gt=0, le=300)
    """Longest wait for data from a server of frames, seconds."""
    total_s: float = Field(30.0, gt=0, le=3600)
    """Longest time for opening a frame with its decompression, for reading a section of a remote frame, and for all
    frames of one alert together, seconds."""
    failure_ttl_s: float = Field(5.0, ge=0, le=3600)
    """Time before a missing or unavailable remote frame is requested again, seconds. It also holds for all frames of a
    server that refuses connections, or that left three frames in a row unanswered. A server's Retry-After may extend
    it."""
    remote_ttl_s: float = Field(300.0, ge=0)
    """Time after which a remote frame is opened again and its cached data are dropped, seconds."""
    prefetch_threads: int = Field(8, ge=1, le=64)
    """Number of remote frames of a batch that are opened, and of sections that are fetched, at the same time."""
    s3_endpoint: str | None = Field(None, pattern=r"^https?://[^/?#@\s]+/?$")
    """Endpoint of ``s3:`` frames, ``https://host:port``. By default AWS_ENDPOINT_URL of the environment, else Amazon.
    Credentials always come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, a role)."""
    s3_region: str | None = None
    """Region of the buckets. By default AWS_REGION of the environment, else us-east-1."""
    s3_anonymous: bool = False
    """Read public buckets without credentials."""
    gs_endpoint: str | None = Field(None, pattern=r"^https?://[^/?#@\s]+/?$")
    """Endpoint of ``gs:`` frames. By default GOOGLE_BASE_URL of the environment, else Google. Credentials always come
    from the environment (GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_SERVICE_ACCOUNT, the machine's account)."""
    gs_anonymous: bool = False
    """Read public buckets of Google without credentials."""
    abfs_account: str | None = Field(None, pattern=r"^[a-z0-9]{3,24}$")
    """Azure storage account of the containers in ``abfs://container/path``. By default AZURE_STORAGE_ACCOUNT_NAME of
    the environment. Credentials always come from the environment (AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN,
    an identity)."""
    abfs_endpoint: str | None = Field(None, pattern=r"^https?://[^?#@\s]+$")
    """Endpoint of the account. By default AZURE_STORAGE_ENDPOINT of the environment, else Azure."""
    abfs_anonymous: bool = False
    """Read public containers of Azure without credentials."""


class ResolveSettings(_Section):
    """The URLs of frames that an alert does not name; see `stampworker.resolve`."""

    resolver: str = Field("alert", min_length=1)
    """Name of the resolver: ``alert`` (alerts name their frames), ``template`` (the templates below), ``ztf`` (ZTF's
    archive, from pdiffimfilename), ``stdweb`` (the folder of an STDWeb task), or an entry point of the group
    stampworker.resolvers."""
    root: str = ""
    """Folder or URL prefix that replaces {root} in templates. It may have fields, too. An empty or relative one starts
    at the first of frame_roots. Every frame must be beneath one of frame_roots in any case."""
    planes: Planes = ()
    """Planes that the resolver gives. By default science, template and difference for ztf, all planes for others."""
    templates: Templates = Field(default_factory=dict)
    """Plane and URL with fields of the alert and of its extra in braces, such as
    { difference = "{root}/{mjd:%Y%m%d}/{visit}-{ccd:02d}_diff.fits.fz#1" }. They replace the resolver's own templates.
    In the environment and in flags they are JSON."""


class AlertSettings(_Section):
    """Decoding of the incoming alerts."""

    schema_folder: Path | None = None
    """Folder with the files ``<schema id>.avsc``, for alerts in Confluent wire format."""


class WorkerSettings(_Section):
    """The worker: topics, group, retries, batches and transactions."""

    input_topic: Names = Field(("alerts",), min_length=1)
    """Topics with the alerts."""
    packet_topic: str = Field("packets", min_length=1)
    """Topic for the packets."""
    reject_topic: str = Field("rejects", min_length=1)
    """Topic for rejected alerts (dead letters)."""
    retry_topic: str | None = Field(None, min_length=1)
    """Topic, for this group alone, in which alerts with missing or unavailable frames wait for another attempt. Without
    it they are rejected at once."""
    retry_delay_s: float = Field(30.0, gt=0, le=86_400)
    """Time between two attempts, seconds."""
    retry_missing_for_s: float = Field(600.0, ge=0)
    """Time after the first attempt in which an alert with a missing frame is tried again, seconds. The frame may be
    late."""
    retry_unavailable_for_s: float = Field(3600.0, ge=0)
    """The same for an unavailable frame, seconds. Its server may be down or busy, or may want other credentials."""
    group: str = Field("stampworker", min_length=1)
    """Kafka consumer group."""
    slot: int | None = Field(None, ge=0)
    """Number of this worker in its group, for its transactional id. By default the last digits of the host name, else
    0."""
    guarantee: Literal["exactly-once", "at-least-once"] = "exactly-once"
    """Use at-least-once for brokers without transactions."""
    batch_count: int = Field(200, ge=1)
    """Largest number of alerts in a batch."""
    batch_bytes: int = Field(16 << 20, ge=1)
    """Size of a batch's alerts at which it is closed, bytes."""
    batch_s: float = Field(0.5, gt=0)
    """Time after its first alert at which a batch is closed, seconds."""
    transaction_timeout_s: float = Field(10.0, ge=1, le=900)
    """The broker aborts a transaction that is open for longer, seconds. After a crash, readers may wait this long."""
    deadline_s: float = Field(60.0, gt=0, le=240)
    """Longest time for publishing and committing one batch, seconds. It is below the group's poll interval of 300 s."""

    @model_validator(mode="after")
    def _no_loop(self) -> Self:
        for name in ("packet_topic", "reject_topic", "retry_topic"):
            if getattr(self, name) in self.input_topic:
                raise ValueError(f"{name} is an input topic, too: the worker would read what it writes")
        if self.retry_topic in (self.packet_topic, self.reject_topic):
            raise ValueError(f"retry_topic is the topic of packets or rejects, too: {self.retry_topic!r}")
        return self

    def slot_number(self) -> int:
        """Return the slot: the setting, else the last digits of the host name (a StatefulSet's ordinal), else 0."""
        if self.slot is not None:
            return self.slot
        found = re.search(r"(\d{1,6})$", socket.gethostname().split(".")[0])
        return int(found[1]) if found else 0

    def transactional_id(self) -> str:
        """Return ``<group>-<slot>``. It is stable, so a restarted worker ends the transaction that it left open."""
        return f"{self.group}-{self.slot_number()}"


class LogSettings(_Section):
    """The log, on standard error."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest severity in the log."""


class Settings(_Section):
    """All settings."""

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


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``; the nearest known is …`` for a message, or nothing if no known name is similar."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; the nearest known is {found[0]!r}" if found else ""


def load(
    path: Path | None = None, environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None
) -> Settings:
    """Read and check the settings of a TOML file, the environment and the flags.

    Of the environment, names without the prefix ``STAMPWORKER_`` are ignored, and so are ``STAMPWORKER_TEST_*`` (for
    the tests) and ``STAMPWORKER_CONFIG`` (the path of the file, for the command line). A flag is named ``section.key``,
    or ``kafka.<name>`` for librdkafka's properties. A ConfigError names each setting that is unknown or has a value
    that is not allowed, or the file that cannot be read.
    """
    values: dict[str, dict[str, object]] = {}
    for section, keys in _read_toml(path).items() if path else ():
        if not isinstance(keys, dict):
            is_known = section in Settings.model_fields
            problem = f"is a section, wanted a table [{section}]" if is_known else "is outside a section"
            raise ConfigError(f"{path}: {section!r} {problem}")
        values[section] = _flatten(keys) if section == "kafka" else keys
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
    """Return the settings as TOML that `load` reads, each with its description as a comment; secrets are masked."""
    lines = []
    for section, values in settings.model_dump(mode="json").items():
        model = _sections().get(section)
        about = model.__doc__ if model else Settings.model_fields[section].description
        lines += [f"[{section}]", f"# {about}"]
        for key, value in values.items():
            if model:
                lines += ["", *(f"# {line}" for line in (model.model_fields[key].description or "").splitlines())]
            name = json.dumps(key) if section == "kafka" else key
            shown = "********" if section == "kafka" and _SECRET.search(key) else value
            written = _without_credentials(_toml(shown))
            lines.append(f"# {name} is not set" if shown is None else f"{name} = {written}")
        lines.append("")
    return "\n".join(lines)


def _toml(value: object) -> str:
    """Write a value as TOML: JSON's strings, numbers, booleans and lists are TOML's too; TOML has no null."""
    if isinstance(value, Mapping):  # its keys are planes
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
        # The input of a whole section is left out: it may have secrets.
        found = "" if isinstance(error["input"], Mapping) else f"found {_without_credentials(repr(error['input']))}; "
        problem = error["msg"].removeprefix("Value error, ")
        return f"{prefix}: {found}{problem[0].lower()}{problem[1:]}"
    section, *rest = error["loc"]
    known = _sections()[section].model_fields if rest else Settings.model_fields
    name = _RENAMED.get(where, str(error["loc"][-1]))
    return f"{prefix} is not a setting{nearest(name, known)}"
