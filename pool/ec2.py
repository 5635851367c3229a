"""Machines of Amazon EC2.  The only module of the pool with boto3.

One call a machine: each has a host key of its own in its user data, and a client token made of its name, so that the same call
again finds the same machine (EC2 API reference, "Ensuring idempotency").  What all are marked with is in the call that makes
them: there is no moment at which one has no tag.
"""

from __future__ import annotations

import hashlib
import json
import time

from cafs.errors import CafsError, RemoteError
from cafs.extras import extra
from pool.cloud import ENDED, ENDING, PENDING, RUNNING, STOPPED, Instance, NoCapacityError, Order, RefusedError

with extra("ec2"):
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TAG, NAME_TAG = "cpool", "cpool-name"
_STATES = {"pending": PENDING, "running": RUNNING, "stopping": STOPPED, "stopped": STOPPED, "shutting-down": ENDING}
_FULL = ("Insufficient", "InstanceLimitExceeded", "VcpuLimitExceeded", "MaxSpot", "SpotMaxPrice", "Unsupported")
_LATER = ("RequestLimitExceeded", "Throttling", "ThrottlingException", "Unavailable", "InternalError", "InternalFailure")
_TIMEOUT_S = 20
_VISIBLE_S = 60


class EC2:
    """settings: [cloud] of pool.toml.  Credentials come from where boto3 looks for them."""

    def __init__(self, settings: dict[str, Any], pool: str) -> None:
        self._settings, self._pool, self._device = settings, pool, ""
        limits = Config(connect_timeout=_TIMEOUT_S, read_timeout=_TIMEOUT_S, retries={"total_max_attempts": 1})
        try:
            session = boto3.session.Session(region_name=settings["region"])
            self._ec2: Any = session.client("ec2", endpoint_url=settings.get("endpoint") or None, config=limits)
        except (BotoCoreError, ValueError) as error:
            raise CafsError(f"cannot use EC2: {error}") from error

    def launch(self, order: Order) -> Instance:
        """As of Cloud."""
        settings, name = self._settings, order.name
        tags = [{"Key": TAG, "Value": self._pool}, {"Key": NAME_TAG, "Value": name}, {"Key": "Name", "Value": f"cpool {name}"}]
        asked: dict[str, Any] = {
            "ImageId": settings["image"],
            "InstanceType": order.type,
            "MinCount": 1,
            "MaxCount": 1,
            "ClientToken": hashlib.sha256(f"{self._pool}.{name}".encode()).hexdigest(),
            "UserData": order.user_data,
            "InstanceInitiatedShutdownBehavior": "terminate",
            # One hop: a container on a bridge gets no credentials of the machine.
            "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1, "HttpEndpoint": "enabled"},
            "TagSpecifications": [{"ResourceType": kind, "Tags": tags} for kind in ("instance", "volume")],
        }
        if order.zone.startswith("subnet-"):
            asked["SubnetId"] = order.zone
        else:
            asked["Placement"] = {"AvailabilityZone": order.zone}
        if order.is_spot:
            how = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
            asked["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": how}
        if settings.get("security_groups"):
            asked["SecurityGroupIds"] = settings["security_groups"]
        if settings.get("disk_gb"):
            disk = {"VolumeSize": int(settings["disk_gb"]), "DeleteOnTermination": True}
            asked["BlockDeviceMappings"] = [{"DeviceName": self._root_device(), "Ebs": disk}]
        found = self._ask(self._ec2.run_instances, **asked)["Instances"]
        if len(found) != 1:
            raise RemoteError(f"EC2 has launched {len(found)} machines for one")
        return self._instance(found[0])

    def _root_device(self) -> str:
        """Of the image: a disk of another name would be one more."""
        if not self._device:
            images = self._ask(self._ec2.describe_images, ImageIds=[self._settings["image"]])["Images"]
            if not images or not images[0].get("RootDeviceName"):
                raise RefusedError(f"EC2 does not say what the disk of image {self._settings['image']} is called")
            self._device = str(images[0]["RootDeviceName"])
        return self._device

    def instances(self) -> list[Instance]:
        """As of Cloud."""
        mine = [{"Name": f"tag:{TAG}", "Values": [self._pool]}]
        try:
            pages = list(self._ec2.get_paginator("describe_instances").paginate(Filters=mine))
        except (ClientError, BotoCoreError) as error:
            raise _meaning(error) from error
        return [self._instance(one) for page in pages for group in page["Reservations"] for one in group["Instances"]]

    def look(self, instance: Instance) -> Instance | None:
        """As of Cloud."""
        try:
            found = self._ask(self._ec2.describe_instances, InstanceIds=[instance.id])["Reservations"]
        except RefusedError as error:
            if "InvalidInstanceID.NotFound" in str(error):
                _check_visible(instance)
                return None
            raise
        return next((self._instance(one) for group in found for one in group["Instances"]), None)

    def end(self, instances: list[Instance]) -> None:
        """As of Cloud."""
        for one in instances:  # one by one: of several, one that is gone would keep the others
            try:
                self._ask(self._ec2.terminate_instances, InstanceIds=[one.id])
            except RefusedError as error:
                if "InvalidInstanceID.NotFound" not in str(error):
                    raise
                _check_visible(one)

    def spot_price(self, kind: str) -> float | None:
        """The dearest of its zones now, an hour."""
        zones = [zone for zone in self._settings["zones"] if not zone.startswith("subnet-")]
        more = {"Filters": [{"Name": "availability-zone", "Values": zones}]} if zones else {}
        asked = {"InstanceTypes": [kind], "ProductDescriptions": ["Linux/UNIX"], "MaxResults": 100, **more}
        found = self._ask(self._ec2.describe_spot_price_history, **asked)["SpotPriceHistory"]
        latest: dict[str, tuple[Any, float]] = {}
        for one in found:
            known = latest.get(one["AvailabilityZone"])
            if known is None or one["Timestamp"] > known[0]:
                latest[one["AvailabilityZone"]] = one["Timestamp"], float(one["SpotPrice"])
        return max((price for _, price in latest.values()), default=None)

    def price(self, kind: str) -> float | None:
        """Of a Linux machine on demand, an hour (AWS Price List Query API, GetProducts)."""
        wanted = {"instanceType": kind, "regionCode": self._settings["region"], "operatingSystem": "Linux"}
        wanted |= {"tenancy": "Shared", "preInstalledSw": "NA", "capacitystatus": "Used"}
        filters = [{"Type": "TERM_MATCH", "Field": name, "Value": value} for name, value in wanted.items()]
        try:
            there: Any = boto3.session.Session(region_name="us-east-1").client("pricing")
        except BotoCoreError as error:
            raise CafsError(f"cannot ask for prices: {error}") from error
        products = self._ask(there.get_products, ServiceCode="AmazonEC2", Filters=filters)["PriceList"]
        return dollars(products)

    @staticmethod
    def _ask(call: Any, **fields: Any) -> Any:
        try:
            return call(**fields)
        except (ClientError, BotoCoreError) as error:
            raise _meaning(error) from error

    def _instance(self, found: dict[str, Any]) -> Instance:
        tags = {one["Key"]: one["Value"] for one in found.get("Tags", [])}
        key = "PrivateIpAddress" if self._settings.get("address") == "private" else "PublicIpAddress"
        state = _STATES.get(found["State"]["Name"], ENDED)
        zone = found.get("Placement", {}).get("AvailabilityZone", "")
        since = found["LaunchTime"].timestamp()
        return Instance(found["InstanceId"], tags.get(NAME_TAG, ""), state, found.get(key) or "", zone, since)


def _check_visible(instance: Instance) -> None:
    """What is not there may only be too new to be shown (EC2 API reference, "Eventual consistency").  Raises RemoteError."""
    if time.time() - instance.launched_s < _VISIBLE_S:
        raise RemoteError(f"EC2 does not show {instance.name} yet")


def _meaning(error: ClientError | BotoCoreError) -> CafsError:
    if not isinstance(error, ClientError):
        return RemoteError(f"EC2 does not answer: {error}")
    code, text = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", "")
    said = f"EC2 says {code}: {text}"
    if code.startswith(_LATER) or error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500:
        is_full = code.startswith(_FULL)
        return NoCapacityError(said) if is_full else RemoteError(said)
    return NoCapacityError(said) if code.startswith(_FULL) else RefusedError(said)


def dollars(products: list[str]) -> float | None:
    """The price on demand in an answer of GetProducts, a JSON text each; None if there is none."""
    for text in products:
        try:
            terms = json.loads(text)["terms"]["OnDemand"].values()
            for dimension in (one for term in terms for one in term["priceDimensions"].values()):
                price = float(dimension["pricePerUnit"]["USD"])
                if dimension["unit"] == "Hrs" and price > 0:
                    return price
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return None
