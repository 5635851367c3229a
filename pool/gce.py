"""Machines of Google Compute Engine.  The only module with google-cloud-compute.

A machine's name is its identity: to insert it again is answered with 409, and then it is the one.  Its boot disk goes with it;
it may run for max_run_s at most and is deleted then, as it is when it is preempted (Compute Engine API, instances.insert).
"""

from __future__ import annotations

import uuid
from datetime import datetime

from cafs.errors import CafsError, RemoteError
from cafs.extras import extra
from pool.cloud import PENDING, RUNNING, STOPPED, Instance, NoCapacityError, Order, RefusedError

with extra("gce"):
    from google.api_core import exceptions
    from google.auth.credentials import AnonymousCredentials
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import compute_v1 as compute
    from google.cloud.compute_v1.services.instances.transports.rest import InstancesRestTransport
    from google.cloud.compute_v1.services.zone_operations.transports.rest import ZoneOperationsRestTransport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LABEL = "cpool"
_STATES = {"PROVISIONING": PENDING, "STAGING": PENDING, "REPAIRING": PENDING, "RUNNING": RUNNING}
_FULL = ("ZONE_RESOURCE_POOL_EXHAUSTED", "QUOTA_EXCEEDED", "RESOURCE_OPERATION_RATE_EXCEEDED")
_WITH_GPUS = ("a2-", "a3-", "a4", "g2-", "g4-")
_TIMEOUT_S = 20.0
_WAIT_S = 150.0
_RUN_S = 7 * 86400


class GCE:
    """settings: [cloud] of pool.toml.  Credentials come from where Google's library looks for them."""

    def __init__(self, settings: dict[str, Any], pool: str) -> None:
        self._settings, self._pool, self._project = settings, pool, settings["project"]
        more: dict[str, Any] = {}
        if settings.get("endpoint"):  # of something that only behaves like it
            scheme, _, host = settings["endpoint"].partition("://")
            more = {"host": host, "url_scheme": scheme, "credentials": AnonymousCredentials()}  # type: ignore[no-untyped-call]
        try:
            self._instances = compute.InstancesClient(transport=InstancesRestTransport(**more))
            self._operations = compute.ZoneOperationsClient(transport=ZoneOperationsRestTransport(**more))
        except GoogleAuthError as error:
            raise CafsError(f"cannot use GCE: {error}", hint="gcloud auth application-default login") from error

    def launch(self, order: Order) -> Instance:
        """As of Cloud."""
        where = {"project": self._project, "zone": order.zone}
        again = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self._pool}.{order.name}"))
        request = {**where, "request_id": again, "instance_resource": self._resource(order)}
        try:
            operation = self._ask(self._instances.insert_unary, request=request)
        except _ThereIsOneError:
            return self._begun(order, None)
        except _ThereIsNoneError as error:
            raise RefusedError(f"GCE says 404: {error}") from None
        return self._begun(order, operation.name)

    def _begun(self, order: Order, operation: str | None) -> Instance:
        """What has become of an insert that was taken: nothing but the operation's own error says that there is no machine."""
        where = {"project": self._project, "zone": order.zone}
        try:
            done = self._ask(self._operations.wait, _WAIT_S, request={**where, "operation": operation}) if operation else None
            errors = list(done.error.errors) if done else []
            found = None if errors else self._get(order.name, order.zone)
        except (RefusedError, _ThereIsNoneError, _ThereIsOneError) as error:
            raise RemoteError(f"GCE does not say what has become of {order.name}: {error}") from error
        if errors:
            said = f"GCE says {errors[0].code}: {errors[0].message}"
            raise NoCapacityError(said) if errors[0].code.startswith(_FULL) else RefusedError(said)
        if found is None:
            raise RemoteError(f"GCE does not show {order.name} yet")
        return found

    def _resource(self, order: Order) -> compute.Instance:
        settings = self._settings
        how = {"provisioning_model": "SPOT" if order.is_spot else "STANDARD"}
        if order.is_spot or order.type.startswith(_WITH_GPUS):  # they cannot be moved, and others need not end
            how["on_host_maintenance"] = "TERMINATE"
        limits = {"max_run_duration": {"seconds": int(settings.get("max_run_s", _RUN_S))}, "automatic_restart": False}
        public = [{"type_": "ONE_TO_ONE_NAT", "name": "External NAT"}] if settings.get("address") != "private" else []
        disk = {"source_image": settings["image"], "disk_size_gb": int(settings.get("disk_gb", 20))}
        metadata = {
            "startup-script": order.user_data,
            "ssh-keys": f"{settings['user']}:{order.client_key}",
            "block-project-ssh-keys": "TRUE",
            "enable-oslogin": "FALSE",
        }
        return compute.Instance(
            name=order.name,
            machine_type=f"zones/{order.zone}/machineTypes/{order.type}",
            labels={LABEL: self._pool},
            disks=[{"boot": True, "auto_delete": True, "initialize_params": disk}],
            network_interfaces=[{"network": settings.get("network") or "global/networks/default", "access_configs": public}],
            metadata={"items": [{"key": key, "value": value} for key, value in metadata.items()]},
            scheduling={**how, **limits, "instance_termination_action": "DELETE"},
        )

    def instances(self) -> list[Instance]:
        """As of Cloud."""
        request = {"project": self._project, "filter": f"labels.{LABEL}={self._pool}"}
        pages = self._ask(lambda **given: list(self._instances.aggregated_list(**given)), request=request)
        return [_instance(one) for _, scoped in pages for one in scoped.instances]

    def look(self, instance: Instance) -> Instance | None:
        """As of Cloud."""
        return self._get(instance.name, instance.zone)

    def end(self, instances: list[Instance]) -> None:
        """As of Cloud."""
        for one in instances:
            request = {"project": self._project, "zone": one.zone, "instance": one.name}
            try:
                self._ask(self._instances.delete_unary, request=request)
            except _ThereIsNoneError:
                continue
            except _ThereIsOneError as error:
                raise RemoteError(f"GCE cannot delete {one.name} now: {error}") from None

    def _get(self, name: str, zone: str) -> Instance | None:
        try:
            request = {"project": self._project, "zone": zone, "instance": name}
            return _instance(self._ask(self._instances.get, request=request))
        except _ThereIsNoneError:
            return None

    @staticmethod
    def _ask(call: Any, timeout_s: float = _TIMEOUT_S, **fields: Any) -> Any:
        try:
            return call(**fields, timeout=timeout_s, retry=None)
        except exceptions.Conflict as error:
            raise _ThereIsOneError(error.message) from None
        except exceptions.NotFound as error:
            raise _ThereIsNoneError(error.message) from None
        except (exceptions.TooManyRequests, exceptions.ServerError, exceptions.RetryError) as error:
            raise RemoteError(f"GCE does not answer: {error.message}") from error
        except exceptions.GoogleAPICallError as error:
            is_later = "rateLimitExceeded" in str(error)
            raise (RemoteError if is_later else RefusedError)(f"GCE says {error.code}: {error.message}") from error
        except (OSError, GoogleAuthError) as error:  # requests' errors are OSErrors
            raise RemoteError(f"GCE does not answer: {error}") from error


class _ThereIsOneError(Exception):
    """409: of this name."""


class _ThereIsNoneError(Exception):
    """404."""


def _instance(found: compute.Instance) -> Instance:
    interface = found.network_interfaces[0] if found.network_interfaces else None
    public = interface.access_configs[0].nat_i_p if interface and interface.access_configs else ""
    address = public or (interface.network_i_p if interface else "")
    since = datetime.fromisoformat(found.creation_timestamp).timestamp() if found.creation_timestamp else 0.0
    zone = found.zone.rpartition("/")[2]
    return Instance(str(found.id), found.name, _STATES.get(found.status, STOPPED), address, zone, since)
