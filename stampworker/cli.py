"""The command line, the only reader of arguments and environment.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import logging
import math
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import stampworker
from stampworker import config
from stampworker.config import PLANES, Settings
from stampworker.cutouts import write_cutout
from stampworker.cutouts.adjust import CORE
from stampworker.enrich import Enricher, check_frames
from stampworker.errors import AlertError, ConfigError, StampworkerError
from stampworker.formats import files, tables
from stampworker.formats.alerts import Alert, encode
from stampworker.formats.packets import Packet
from stampworker.formats.packets import encode as encode_packet
from stampworker.formats.rejects import Reject
from stampworker.frames import FrameStore
from stampworker.frames.urls import file_url
from stampworker.resolve import ALERT_ONLY, Resolver, load_resolver
from stampworker.simulation import demo
from stampworker.simulation.night import simulate
from stampworker.stream.kafka import Record, check_topics, publish_all
from stampworker.stream.replay import parse_bound, replay
from stampworker.stream.worker import Totals, Worker
from stampworker.viewer import picture

log = logging.getLogger("stampworker")

# Alerts in a batch: enough to group them by frame, few enough to show progress.
_CHUNK = 256
_FLAGS = (  # settings with a flag of their own; the key is the argument's name
    "worker.slot",
    "worker.group",
    "enrich.radius",
    "frames.frame_roots",
    "resolve.resolver",
    "resolve.root",
    "log.level",
)
# After a stop signal, the process is ended this long after the worker's deadline, even if the Kafka client hangs.
_GRACE_S = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console command, by default with the arguments of the process, and return the exit code."""
    args = _parser().parse_args(arguments)
    try:
        settings = _settings(args)
        logging.basicConfig(
            level=settings.log.level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
        )
        code: int = args.command(args, settings)
        return code
    except ConfigError as exc:
        print(f"stampworker: {exc}", file=sys.stderr)
        return 2
    except (StampworkerError, OSError, ValueError) as exc:
        log.debug("failed", exc_info=True)
        print(f"stampworker: {type(exc).__name__}: {exc}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stampworker: stopped", file=sys.stderr)
    return 1


def _settings(args: argparse.Namespace) -> Settings:
    flags: dict[str, object] = {}
    for text in args.set or ():
        name, mark, value = text.partition("=")
        if not mark or "." not in name:
            # Without the value: it may be a secret.
            raise ConfigError(f"--set: found {name.partition(' ')[0]!r}, wanted section.key=value")
        flags[name] = value
    given = {name: getattr(args, name.partition(".")[2], None) for name in _FLAGS}
    flags |= {name: value for name, value in given.items() if value is not None}
    path = args.config or os.environ.get("STAMPWORKER_CONFIG")
    return config.load(Path(path) if path else None, os.environ, flags)


# -- commands ---------------------------------------------------------------------------------------------------


def _enrich(args: argparse.Namespace, settings: Settings) -> int:
    _check_table(args.table, args.to)
    resolver = load_resolver(settings.resolve)
    paths = [Path(name) for name in args.alerts]
    flags = _table_frames(args, paths, resolver)
    urls = {plane: file_url(path) for plane, path in flags.items()}
    if urls:
        # A frame that cannot be read is wrong for every row, so the command fails before it writes anything.
        with FrameStore(settings.frames, allowed=urls.values()) as store:
            check_frames(urls, store)
    options = {"frames": urls, "columns": _columns(args.columns), "pixel_origin": args.pixel_origin}
    read = [files.read_alerts(path, settings.alerts.schema_folder, **options) for path in paths]
    to = _empty_folder(args.to)
    total = sum(len(alerts) for alerts, _ in read)
    results: list[Packet | Reject] = []
    with tqdm(total=total, unit="alert", disable=None, leave=False) as bar:
        for roots, alerts in _by_roots(zip(paths, (alerts for alerts, _ in read), strict=True), settings):
            frames = settings.frames.model_copy(update={"frame_roots": roots})
            with FrameStore(frames, allowed=urls.values()) as store:
                batches = (alerts[start : start + _CHUNK] for start in range(0, len(alerts), _CHUNK))
                for batch in Enricher(settings, store, resolver).stream(batches):
                    _write_results(to, batch, args.cutouts)
                    # Packets have stamps: they are kept only for the table.
                    results += batch if args.table else [r for r in batch if isinstance(r, Reject)]
                    bar.update(len(batch))
    if args.table:
        rows = iter(results)
        parts = [tables.results_table(table, itertools.islice(rows, len(table))) for _, table in read]
        tables.write_tables(Path(args.table), parts)
    return _report(args, total, [r for r in results if isinstance(r, Reject)], to)


def _table_frames(args: argparse.Namespace, paths: Sequence[Path], resolver: Resolver) -> dict[str, str]:
    """Return the frames that the flags name for the rows of tables."""
    flags = {plane: str(getattr(args, plane)) for plane in PLANES if getattr(args, plane)}
    table = next((path for path in paths if tables.is_table(path)), None)
    if flags and table is None:
        raise ConfigError("--science and the like name the frames of a table; these alerts name their own")
    if table is not None and "science" not in flags and resolver is ALERT_ONLY:
        raise ConfigError(f"{table}: a table names no frames, wanted at least --science FILE, or --resolver NAME")
    if "error" in flags and "variance" in flags:
        raise ConfigError("--error, --variance: found both, wanted one of them")
    return flags


def _by_roots(
    read: Iterable[tuple[Path, list[Alert | AlertError]]], settings: Settings
) -> Iterator[tuple[tuple[str, ...], list[Alert | AlertError]]]:
    """Yield the frame roots of consecutive files, with their alerts; by default the roots are the files' folders."""
    given = settings.frames.frame_roots
    for roots, group in itertools.groupby(read, lambda file: given or (str(file[0].resolve().parent),)):
        yield roots, [alert for _, alerts in group for alert in alerts]


def _report(args: argparse.Namespace, total: int, rejects: Sequence[Reject], to: Path) -> int:
    kinds = Counter(type(reject.error).__name__ for reject in rejects)
    first = {type(reject.error).__name__: reject.error for reject in reversed(rejects)}
    counts = {"alerts": total, "packets": total - len(rejects), "rejects": len(rejects)}
    lines = [", ".join(f"{count} {name}" for name, count in counts.items()) + f" in {to}"]
    lines += [f"  {count} {name}, such as: {first[name]}" for name, count in kinds.most_common()]
    return _print(args, {**counts, "errors": kinds}, "\n".join(lines))


def _print(args: argparse.Namespace, values: Mapping[str, Any], text: str) -> int:
    """Print a result, with --json as an object; return the exit code."""
    print(json.dumps(values) if args.json else text)
    return 0


def _write_results(to: Path, results: Sequence[Packet | Reject], cutouts: bool) -> None:
    # A file name that is not UTF-8 has lone surrogates. JSON can escape them, UTF-8 cannot encode them.
    with (to / "rejects.jsonl").open("a", encoding="utf-8", errors="backslashreplace") as rejects:
        for result in results:
            if isinstance(result, Reject):
                rejects.write(json.dumps(result.to_record(), ensure_ascii=False) + "\n")
                continue
            (to / f"{result.packet_id}.avro").write_bytes(encode_packet(result))
            if cutouts:
                write_cutout(result.to_cutout(), to / f"{result.packet_id}.fits")


def _check_table(name: str | None, to: str) -> None:
    if name is None:
        return
    if Path(name).suffix.lower() not in tables.WRITTEN:
        raise ConfigError(f"--table: found {name!r}, wanted a name that ends in {', '.join(tables.WRITTEN)}")
    if not Path(name).parent.is_dir() and Path(name).parent.resolve() != Path(to).resolve():
        raise ConfigError(f"--table: found no folder {str(Path(name).parent)!r} for {name!r}")


def _require_roots(settings: Settings) -> None:
    if not settings.frames.frame_roots:
        raise ConfigError("frames.frame_roots: found nothing, wanted the folders or URL prefixes of the frames")


def _run(args: argparse.Namespace, settings: Settings) -> int:
    _require_roots(settings)
    worker = Worker(settings, drained=args.drain)
    _stop_on_signals(worker, settings)
    return _totals(args, worker.run())


def _replay(args: argparse.Namespace, settings: Settings) -> int:
    _require_roots(settings)
    run = args.run or datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    totals = replay(
        settings,
        args.topic,
        args.to_topic,
        run=run,
        start=parse_bound(args.start) if args.start else None,
        end=parse_bound(args.end) if args.end else None,
        on_worker=lambda worker: _stop_on_signals(worker, settings),
    )
    return _totals(args, totals)


def _totals(args: argparse.Namespace, totals: Totals) -> int:
    return _print(args, vars(totals), ", ".join(f"{value} {name}" for name, value in vars(totals).items()))


def _stop_on_signals(worker: Worker, settings: Settings) -> None:
    """Finish the batch at the first SIGTERM or SIGINT, drop it at the second."""

    def handle(number: int, _frame: object) -> None:
        if worker.stopping:
            raise KeyboardInterrupt
        log.info("%s: finishing the batch", signal.Signals(number).name)
        worker.stop()
        watchdog = threading.Timer(settings.worker.deadline_s + _GRACE_S, os._exit, (1,))
        watchdog.daemon = True
        watchdog.start()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def _publish(args: argparse.Namespace, settings: Settings) -> int:
    topic = args.topic or settings.worker.input_topic[0]
    alerts = []
    for name in args.alerts:
        if tables.is_table(Path(name)):
            raise ConfigError(f"{name}: a table of candidates names no frames, wanted alerts")
        for alert in files.read_alerts(Path(name), settings.alerts.schema_folder)[0]:
            if isinstance(alert, AlertError):
                raise AlertError(f"{name}: {alert}", alert.alert_id) from alert
            alerts.append(alert)
    check_topics(settings, [topic] if settings.worker.guarantee == "exactly-once" else [])
    records = (Record(topic, alert.key.encode(), encode(alert)) for alert in alerts)
    publish_all(settings, records)
    return _print(args, {"alerts": len(alerts)}, f"{len(alerts)} alerts to {topic}")


def _show(args: argparse.Namespace, _settings: Settings) -> int:
    packet = Packet.read_file(args.packet)
    if args.json:
        record = packet.to_record()
        stamps = {name: stamp.data.shape for name, stamp in packet.stamps.items()}
        kept = {k: v for k, v in record.items() if not k.startswith("cutout")}
        print(json.dumps(_finite({**kept, "stamps": stamps}), ensure_ascii=False, allow_nan=False))
    else:
        print(picture.describe(packet))
    if args.png:
        picture.picture([packet], args.png)
    return 0


def _finite(value: Any) -> Any:
    """Return a value with None instead of NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return {name: _finite(item) for name, item in value.items()} if isinstance(value, dict) else value


def _simulate(args: argparse.Namespace, _settings: Settings) -> int:
    options = {name: getattr(args, name) for name in ("frames", "size", "candidates", "seed")}
    night = simulate(args.directory, **options, progress=not args.json)
    values = {"directory": str(night.directory), "alerts": args.candidates}
    return _print(args, values, f"{args.candidates} alerts in {night.directory}")


def _demo(args: argparse.Namespace, settings: Settings) -> int:
    return demo.run(Path(args.directory), candidates=args.candidates, seed=args.seed, settings=settings)


def _config(_args: argparse.Namespace, settings: Settings) -> int:
    print(config.describe(settings))
    return 0


# -- arguments --------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stampworker", description="Stamps and artefact metrics for astronomical alerts, exactly once."
    )
    parser.add_argument(
        "--version", action="version", version=f"stampworker {stampworker.__version__} (fit: {CORE} core)"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_enrich(commands)
    run = _add(commands, "run", _run, "consume alerts and publish packets until stopped")
    run.add_argument("--drain", action="store_true", help="stop at the end that the topic has now")
    _worker_flags(run)
    _add_replay(commands)
    publish = _add(commands, "publish", _publish, "send the alerts of files to a topic")
    publish.add_argument("alerts", nargs="+", metavar="ALERTS", help="JSON or Avro files")
    publish.add_argument("--topic", help="default: the first of worker.input_topic")
    show = _add(commands, "show", _show, "print a packet and draw its stamps")
    show.add_argument("packet", metavar="PACKET", help="an Avro file")
    show.add_argument("--png", metavar="FILE", help="write a picture of the stamps")
    sim = _add(commands, "simulate", _simulate, "write a small survey night with known truth")
    sim.add_argument("directory", metavar="DIR", help="an empty or absent folder")
    sim.add_argument("--frames", type=int, default=1, help="pointings (%(default)s)")
    sim.add_argument("--size", type=int, default=1024, help="side of a frame, pixels (%(default)s)")
    sim.add_argument("--candidates", type=int, default=60, help="on all frames together (%(default)s)")
    sim.add_argument("--seed", type=int, default=1, help="of the random numbers (%(default)s)")
    show_demo = _add(commands, "demo", _demo, "run the worker on a simulated night and an embedded broker")
    show_demo.add_argument("directory", nargs="?", default="demo", metavar="DIR", help="output folder (%(default)s)")
    show_demo.add_argument("--candidates", type=int, default=60, help="number of candidates (%(default)s)")
    show_demo.add_argument("--seed", type=int, default=1, help="of the random numbers (%(default)s)")
    _add(commands, "config", _config, "print all settings, with secrets masked")
    return parser


def _add(commands: Any, name: str, command: Callable[..., int], what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.set_defaults(command=command)
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings (default: $STAMPWORKER_CONFIG)")
    parser.add_argument("--set", action="append", metavar="SECTION.KEY=VALUE", help="override one setting; repeatable")
    parser.add_argument("--level", metavar="LEVEL", help="lowest severity in the log: DEBUG, INFO, WARNING, ERROR")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _worker_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slot", type=int, help="number of this worker in its group")
    parser.add_argument("--group", help="consumer group")
    _frame_flags(parser)


def _frame_flags(parser: argparse.ArgumentParser) -> None:
    where = "frames may be read beneath this folder or URL prefix, and if a flag names them; repeatable"
    parser.add_argument("--frame-root", dest="frame_roots", action="append", metavar="DIR", help=where)
    names = "finds frames that alerts do not name: template, ztf, stdweb, or the resolver of another package"
    parser.add_argument("--resolver", metavar="NAME", help=names)
    root = "folder or URL prefix of the resolver's frames, beneath a frame root; relative to the first frame root"
    parser.add_argument("--resolver-root", dest="root", metavar="DIR", help=root)
    parser.add_argument("--radius", type=float, help="half-size of a stamp, pixels")


def _add_enrich(commands: Any) -> None:
    parser = _add(commands, "enrich", _enrich, "make packets of alerts in files, without Kafka")
    parser.add_argument("alerts", nargs="+", metavar="ALERTS", help="JSON, Avro, or a table (ECSV, VOTable, FITS, CSV)")
    parser.add_argument("--to", required=True, metavar="DIR", help="an empty or absent folder")
    parser.add_argument("--table", metavar="FILE", help="write a table with the columns and metrics of each candidate")
    parser.add_argument("--cutouts", action="store_true", help="write the cutouts as FITS files, too")
    _frame_flags(parser)
    table = parser.add_argument_group("tables of candidates")
    for plane in PLANES:
        table.add_argument(
            f"--{plane}", metavar="FILE", help=f"the {plane} frame of every row, file or URL; FILE#HDU is an HDU"
        )
    table.add_argument("--columns", metavar="x=X_IMAGE,...", help="names of columns that differ")
    table.add_argument("--pixel-origin", type=int, choices=(0, 1), default=0, help="number of the table's first pixel")


def _add_replay(commands: Any) -> None:
    parser = _add(commands, "replay", _replay, "send a retained topic through the worker again, into another topic")
    parser.add_argument("topic", metavar="TOPIC")
    parser.add_argument("--to-topic", required=True, metavar="TOPIC")
    parser.add_argument(
        "--from",
        dest="start",
        metavar="WHEN",
        help="begin at this offset of every partition, or at this ISO time (UTC if it has no zone)",
    )
    parser.add_argument("--until", dest="end", metavar="WHEN", help="end before this offset or time")
    parser.add_argument(
        "--run",
        metavar="NAME",
        help="name of the replay; running it again with the same name resumes (default: the time)",
    )
    _worker_flags(parser)


def _columns(text: str | None) -> dict[str, str]:
    columns = {}
    for part in filter(str.strip, (text or "").split(",")):
        name, mark, column = part.partition("=")
        if not mark:
            raise ConfigError(f"--columns: found {part!r}, wanted name=COLUMN")
        columns[name.strip()] = column.strip()
    return columns


def _empty_folder(name: str) -> Path:
    folder = Path(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--to: {name} is there and not empty, wanted a folder that is empty or absent")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
