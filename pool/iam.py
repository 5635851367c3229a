"""The least that the controller of a pool needs to be allowed at AWS, as an IAM policy (IAM user guide, "Policies")."""

from __future__ import annotations

import json

_MARK = "cpool"


def policy(pool: str) -> str:
    """pool: its id.  It may launch machines only with the pool's mark, and end only those that have it."""
    launched = ["instance", "volume"]
    used = ["image/*", "subnet/*", "network-interface/*", "security-group/*", "key-pair/*", "launch-template/*", "snapshot/*"]
    statements = [
        {"Sid": "Look", "Effect": "Allow", "Action": ["ec2:DescribeInstances", "ec2:DescribeImages"], "Resource": "*"},
        {
            "Sid": "Prices",
            "Effect": "Allow",
            "Action": ["ec2:DescribeSpotPriceHistory", "pricing:GetProducts"],
            "Resource": "*",
        },
        {
            "Sid": "LaunchMarked",
            "Effect": "Allow",
            "Action": "ec2:RunInstances",
            "Resource": [f"arn:aws:ec2:*:*:{kind}/*" for kind in launched],
            "Condition": {"StringEquals": {f"aws:RequestTag/{_MARK}": pool}},
        },
        {
            "Sid": "LaunchFrom",
            "Effect": "Allow",
            "Action": "ec2:RunInstances",
            "Resource": [f"arn:aws:ec2:*:*:{one}" for one in used],
        },
        {
            "Sid": "MarkAtLaunchOnly",
            "Effect": "Allow",
            "Action": "ec2:CreateTags",
            "Resource": [f"arn:aws:ec2:*:*:{kind}/*" for kind in launched],
            "Condition": {"StringEquals": {"ec2:CreateAction": "RunInstances", f"aws:RequestTag/{_MARK}": pool}},
        },
        {
            "Sid": "EndMarked",
            "Effect": "Allow",
            "Action": "ec2:TerminateInstances",
            "Resource": "arn:aws:ec2:*:*:instance/*",
            "Condition": {"StringEquals": {f"ec2:ResourceTag/{_MARK}": pool}},
        },
    ]
    return json.dumps({"Version": "2012-10-17", "Statement": statements}, indent=2)
