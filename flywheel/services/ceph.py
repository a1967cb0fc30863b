"""The embedded object store: Ceph's RGW on one monitor and one OSD, as an ordinary user, on 127.0.0.1.

A real S3 server, so that what works here works against production: signatures, conditional writes, fsync on
PUT. Its state lies in ``HOME/ceph``; the keys, which radosgw-admin draws at random, in ``HOME/store.json``
(mode 0600) and never on a command line.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flywheel import access
from flywheel.config import BUCKET
from flywheel.errors import ServiceError
from flywheel.services import process
from flywheel.services.process import Progress, free_port, is_free, write_private
from flywheel.store import EMBEDDED_FILE, EmbeddedStore, embedded_store

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool")
PACKAGES = "ceph-mon ceph-osd radosgw ceph-common"
ORDER = ("radosgw", "ceph-osd", "ceph-mon")  # of stopping
REGION = "us-east-1"
USER = "flywheel"
START_S = 120.0  # for each step; a restart after kill -9 replays its log for 11-16 s (measured)
GIB = 1 << 30
_OWNER = {
    "Version": access.VERSION,
    "Statement": [
        {
            "Effect": "Allow",
            "Principal": {"AWS": [f"arn:aws:iam:::user/{USER}"]},
            "Action": ["s3:*"],
            "Resource": [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"],
        }
    ],
}


class Ceph:
    """The embedded store of one state directory."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.dir = home / "ceph"
        self.run = self.dir / "run"
        self.logs = home / "logs"
        self.mark = f"store:{home}"

    def up(self, on_progress: Progress) -> EmbeddedStore:
        """Start what is not running; returns when an object can be written.

        The first start makes the cluster; one that was interrupted is begun again from nothing, which loses
        nothing, since no key for it had been handed out.
        """
        missing = [p for p in PROGRAMS if shutil.which(p) is None]
        if missing:
            raise ServiceError(
                f"embedded store: {', '.join(missing)} not found; on Debian or Ubuntu: apt-get install "
                f"--no-install-recommends {PACKAGES}; elsewhere point AWS_ENDPOINT_URL at a store"
            )
        unfinished = self.dir / "unfinished"
        if unfinished.exists():
            self.down()
            shutil.rmtree(self.dir)
        if not self.dir.exists():
            self._check_disk()
            self.run.mkdir(parents=True, mode=0o700)
            unfinished.touch()
        first = unfinished.exists()
        ports = self._ports(first)
        if first:
            on_progress("making a store")
            self._make_monitor(ports)
        self._start("ceph-mon", "-i", "a")
        if first:
            self._make_osd()
        on_progress("starting the disk")
        self._start("ceph-osd", "-i", "0")
        if first:
            caps = ("--caps", "user-policy=*")  # it grants other clients what they may
            keys = self._keys("user", "create", "--uid", USER, "--display-name", USER, *caps)
            store = EmbeddedStore(
                endpoint=f"http://127.0.0.1:{ports['rgw']}", bucket=BUCKET, region=REGION, **keys
            )
            write_private(self.dir / "keys.json", store.model_dump_json(indent=1))
        on_progress("starting the gateway")
        self._start("radosgw", "-n", "client.rgw")
        self._wait_for_gateway(ports["rgw"])
        saved = EmbeddedStore.model_validate_json((self.dir / "keys.json").read_bytes())
        store = saved.model_copy(update={"endpoint": f"http://127.0.0.1:{ports['rgw']}"})
        client = store.connect()
        client.ensure_bucket()
        if first:
            client.probe()
            unfinished.unlink()
        write_private(self.home / EMBEDDED_FILE, store.model_dump_json(indent=1))
        return store

    def grant(self, name: str, policy: Mapping[str, Any]) -> EmbeddedStore:
        """Keys of its own for one client, made at the first call, that allow what ``policy`` says (see
        ``flywheel.access``) and nothing else. The store must be up."""
        import boto3

        owner = embedded_store(self.home)
        if owner is None:
            raise ServiceError(f"embedded store: it is not up on {self.home}")
        try:
            keys = self._keys("user", "create", "--uid", name, "--display-name", name)
        except ServiceError as e:
            if "exists" not in str(e):
                raise
            keys = self._keys("user", "info", "--uid", name)
        by_owner: dict[str, Any] = {
            "endpoint_url": owner.endpoint,
            "region_name": owner.region,
            "aws_access_key_id": owner.access_key,
            "aws_secret_access_key": owner.secret_key,
        }
        # An object belongs to whoever wrote it (AWS has long done otherwise): the owner is to read it.
        boto3.client("s3", **by_owner).put_bucket_policy(Bucket=owner.bucket, Policy=json.dumps(_OWNER))
        iam = boto3.client("iam", **by_owner)
        iam.put_user_policy(UserName=name, PolicyName="flywheel", PolicyDocument=json.dumps(policy))
        return owner.model_copy(update=keys)

    def down(self) -> None:
        """Stop it; what is stopped already is left so."""
        (self.home / EMBEDDED_FILE).unlink(missing_ok=True)
        for name in ORDER:
            if (p := process.running(self.run, name)) is not None:
                process.stop([p], timeout_s=20.0)
        process.end_marked(self.mark, timeout_s=5.0)

    def status(self) -> dict[str, bool]:
        """Which of its processes run."""
        return {n: process.running(self.run, n) is not None for n in reversed(ORDER)}

    def is_up(self) -> bool:
        """Whether every process runs and the keys are in place."""
        return all(self.status().values()) and embedded_store(self.home) is not None

    # -- making it, once

    def _make_monitor(self, ports: dict[str, int]) -> None:
        keyring = self.dir / "keyring"
        keyring.touch(mode=0o600)
        fsid = str(uuid.uuid4())
        self._write_conf(fsid, ports)
        for entity, caps in {
            "mon.": {"mon": "allow *"},
            "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
            "client.rgw": {"mon": "allow rw", "osd": "allow rwx"},
            "osd.0": {"mon": "allow profile osd", "osd": "allow *"},
        }.items():
            args = [a for daemon, cap in caps.items() for a in ("--cap", daemon, cap)]
            self._do("ceph-authtool", str(keyring), "-n", entity, "--gen-key", *args, conf=False)
        monmap = str(self.dir / "monmap")
        self._do(
            "monmaptool", "--create", "--fsid", fsid, "--addv", "a", _mon_address(ports), monmap, conf=False
        )
        self._do("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", str(keyring))

    def _make_osd(self) -> None:
        keyring = str(self.dir / "keyring")
        self._do("ceph", "auth", "import", "-i", keyring)
        osd = str(uuid.uuid4())
        self._do("ceph", "osd", "new", osd)
        self._do("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd, "--no-mon-config", "--keyring", keyring)
        self._do("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default")

    def _keys(self, *args: str) -> dict[str, str]:
        """The key pair in radosgw-admin's answer."""
        out = self._do("radosgw-admin", *args)
        try:
            key = json.loads(out)["keys"][0]
            return {"access_key": key["access_key"], "secret_key": key["secret_key"]}
        except (ValueError, LookupError):
            raise ServiceError("embedded store: radosgw-admin did not answer with a key pair") from None

    def _check_disk(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.home).free
        if free < 4 * GIB:
            raise ServiceError(
                f"embedded store: {free / GIB:.1f} GiB free at {self.home}, 4 GiB are needed; "
                "free some space or set FLYWHEEL_HOME"
            )

    def _write_conf(self, fsid: str, ports: dict[str, int]) -> None:
        # The block file is sparse: this bounds the store, it takes no space yet.
        block = min(20 * GIB, int(0.8 * shutil.disk_usage(self.home).free))
        d = self.dir
        for part in ("mon", "osd", "rgw"):
            (d / part).mkdir(exist_ok=True)
        (d / "ceph.conf").write_text(f"""\
[global]
fsid = {fsid}
mon_initial_members = a
mon_host = {_mon_address(ports)}
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
keyring = {d}/keyring
run_dir = {d}/run
log_file = {self.logs}/$name.log
mon_cluster_log_file = {self.logs}/cluster.log
log_to_stderr = false
err_to_stderr = true
# a socket path is limited to 107 bytes, which a state directory may exceed
admin_socket =
pid_file =
debug_ms = 0
# one OSD holds the only copy
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
osd_crush_chooseleaf_type = 0
auth_allow_insecure_global_id_reclaim = false
mon_data_avail_warn = 2
mon_data_avail_crit = 1
paxos_propose_interval = 0.1
osd_objectstore = bluestore
bluestore_block_size = {block}
bluestore_block_create = true
bluestore_fsck_on_mount = false
bluestore_cache_autotune = false
bluestore_cache_size = {128 << 20}
[mon.a]
mon_data = {d}/mon
[osd.0]
osd_data = {d}/osd
[client.rgw]
rgw_data = {d}/rgw
rgw_frontends = beast endpoint=127.0.0.1:{ports["rgw"]}
rgw_thread_pool_size = 64
rgw_enable_usage_log = false
""")

    # -- ports

    def _ports(self, first: bool) -> dict[str, int]:
        """The remembered ports; any that somebody else took meanwhile is replaced."""
        path = self.dir / "ports.json"
        ports: dict[str, int] = {} if first else json.loads(path.read_text())
        owner = {"mon_v2": "ceph-mon", "mon_v1": "ceph-mon", "rgw": "radosgw"}
        moved = [
            use
            for use, name in owner.items()
            if use not in ports or (process.running(self.run, name) is None and not is_free(ports[use]))
        ]
        if not moved:
            return ports
        for use in moved:
            ports[use] = free_port({*ports.values()})
        if not first:
            self._move(ports, monitor=any(u.startswith("mon") for u in moved))
        path.write_text(json.dumps(ports))
        return ports

    def _move(self, ports: dict[str, int], *, monitor: bool) -> None:
        """Write new ports where the cluster keeps them: its configuration, and the monitor's own map."""
        fsid = next(
            line.split("=")[1].strip()
            for line in (self.dir / "ceph.conf").read_text().splitlines()
            if line.startswith("fsid")
        )
        if monitor:
            self.down()  # clients hold the old address
            monmap = str(self.dir / "monmap")
            self._write_conf(fsid, ports)
            self._do("ceph-mon", "-i", "a", "--extract-monmap", monmap)
            self._do("monmaptool", "--rm", "a", monmap, conf=False)
            self._do("monmaptool", "--addv", "a", _mon_address(ports), monmap, conf=False)
            self._do("ceph-mon", "-i", "a", "--inject-monmap", monmap)
        else:
            self._write_conf(fsid, ports)

    # -- running programs

    def _do(self, program: str, *args: str, conf: bool = True) -> str:
        """Run one program to its end and return what it printed."""
        argv = [program, *(("-c", str(self.dir / "ceph.conf")) if conf else ()), *args]
        what = " ".join([program, *(a for a in args[:2] if not a.startswith("/"))])
        try:
            done = subprocess.run(
                argv,
                env={**_environ(), process.MARK: self.mark},
                capture_output=True,
                text=True,
                timeout=START_S,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us to handle
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ServiceError(f"embedded store: {what} took over {START_S:.0f} s; see {self.logs}") from None
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
            raise ServiceError(
                f"embedded store: {what} failed ({done.returncode}): {said[0]}; see {self.logs}"
            )
        return done.stdout

    def _start(self, program: str, *args: str) -> None:
        if process.running(self.run, program) is None:
            process.start(
                program,
                [program, "-c", str(self.dir / "ceph.conf"), *args, "-f"],
                mark=self.mark,
                run_dir=self.run,
                log=self.logs / f"{program}.log",
                env=_environ(),
                cwd=self.dir,
            )

    def _wait_for_gateway(self, port: int) -> None:
        began = time.monotonic()
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            for name in ORDER:
                if process.running(self.run, name) is None:
                    log = self.logs / f"{name}.log"
                    raise ServiceError(f"embedded store: {name} ended: {process.tail(log)} (log: {log})")
            try:
                with direct.open(f"http://127.0.0.1:{port}/", timeout=5):
                    return
            except urllib.error.HTTPError as e:
                e.close()
                if e.code < 500:
                    return
            except OSError:
                pass
            if time.monotonic() - began > START_S:
                raise ServiceError(
                    f"embedded store: no answer on 127.0.0.1:{port} for {START_S:.0f} s; see {self.logs}"
                )
            time.sleep(0.1)


def _mon_address(ports: dict[str, int]) -> str:
    return f"[v2:127.0.0.1:{ports['mon_v2']},v1:127.0.0.1:{ports['mon_v1']}]"


def _environ() -> dict[str, str]:
    """Ceph's programs are the system's: nothing of our Python environment may reach its scripts."""
    keep = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "USER")
    return {k: v for k in keep if (v := os.environ.get(k)) is not None}
