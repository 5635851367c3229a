"""Run tests on another Debian, from the wheel, in a virtual machine.

usage: python -m tests.vm.run SUITE [PYTEST ARGUMENT]...

Without arguments: the tests that are named below for the suite.  CI=1 there, so that a skip is a failure.  Where there is no qemu
this prints NOT RUN and ends with 0; with VMTEST=required it fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.vm.machine import PYTHON, SUITES, Machine, VmError, make, missing

SLOWER = 8
"""How many times slower than here: bounds of time in the tests are multiplied by it."""

_KERNEL = (
    "test_kernel.py::test_an_image_of_several_layers_is_mounted_without_merging",
    "test_kernel.py::test_mounts_share_what_is_below_and_the_last_one_takes_it_away",
    "test_kernel.py::test_a_writable_mount_keeps_what_was_written",
    "test_kernel.py::test_what_is_evicted_under_a_live_mount_frees_its_space",
    "test_kernel.py::test_a_directory_of_changes_is_mounted_once_and_over_its_own_image",
    "test_lazy.py::test_when_all_servers_are_killed_at_once_the_next_mount_is_new_and_says_what_is_lost",
    "test_lazy.py::test_the_end_of_the_cgroup_in_which_a_mount_was_made_ends_no_other_mount",
    "test_lazy.py::test_a_copied_mount_namespace_keeps_no_servers",
    "test_lazy.py::test_a_new_program_takes_over_a_live_mount",
)
_FUSE = (
    "test_fuse.py::test_without_its_cache_a_new_server_goes_on",
    "test_fuse.py::test_a_tree_ends_when_the_mount_does_and_leaves_nothing",
    "test_fuse.py::test_fstab_can_name_an_image",
    "test_mount.py::test_mounting_twice_is_fine_and_another_image_there_is_busy",
    "test_mount.py::test_an_ordinary_user_can_mount",
    "test_mount.py::test_access_lists_are_kept_by_the_mount",
)
_ROOTLESS = (
    "test_rootless.py::test_commands_run_with_the_ids_of_the_image_shifted_to_those_of_the_user",
    "test_rootless.py::test_a_container_in_the_background_is_looked_after_from_other_commands",
    "test_rootless.py::test_nothing_is_left_after_a_foreground_container_but_a_process_that_waits",
    "test_rootless.py::test_a_build_of_an_ordinary_user_has_the_owners_that_it_should",
)
_CONTAINERS = (
    "test_crun.py::test_output_and_exit_code_are_the_commands",
    "test_crun.py::test_the_defaults_are_dockers",
    "test_crun.py::test_a_terminal_is_given_with_t",
    "test_crun.py::test_signals_reach_the_command",
    "test_crun.py::test_a_container_dies_with_a_killed_crun_and_leaves_nothing",
    "test_crun.py::test_a_container_runs_on_either_engine_and_leaves_nothing",
    "test_runspec.py::test_every_flag_lands_where_it_belongs",
    "test_runspec.py::test_the_kernel_enforces_the_profile",
    "test_runsecurity.py::test_no_other_user_reaches_a_containers_files_also_after_one_with_ids_of_its_own",
    "test_userns.py::test_it_has_the_ids_of_the_image_inside_and_others_on_the_host_and_on_disk",
    "test_userns.py::test_what_is_copied_has_the_ids_of_each_side",
    "test_userns.py::test_a_network_and_a_terminal_are_its_own_and_what_needs_the_hosts_ids_is_refused",
    "test_containers.py::test_a_container_in_the_background_keeps_log_and_exit_code",
    "test_containers.py::test_exec_has_its_own_streams_environment_and_exit_code",
    "test_containers.py::test_stop_sends_the_signal_waits_and_kills",
    "test_containers.py::test_kill_pause_and_wait",
    "test_containers.py::test_memory_that_runs_out_is_told",
    "test_containers.py::test_stats_and_top_show_what_runs",
    "test_containers.py::test_volumes_are_kept_seeded_shared_and_removed",
    "test_runnetwork.py::test_a_published_port_answers_everywhere_and_goes_with_its_container",
    "test_runnetwork.py::test_neighbours_know_each_other_by_name_and_other_networks_not",
)
_REST = (
    "test_cbuild.py::test_an_image_whose_last_steps_make_no_layer_can_be_loaded_by_docker",
    "test_cbuild.py::test_squash_makes_one_layer_and_the_same_tree",
    "test_cbuild.py::test_what_a_killed_build_has_left_the_next_one_removes",
    "test_pool.py::test_a_job_runs_here_and_its_code_and_words_come_back",
    "test_pool.py::test_an_agent_that_is_killed_leaves_its_jobs_to_the_next",
    "test_pool.py::test_map_is_a_filter",
    "test_pool.py::test_a_job_runs_in_an_image",
    "test_functions.py::test_a_program_of_lines_answers_calls_and_maps_them_in_order",
)
TESTS = {
    "bookworm": _FUSE + _ROOTLESS,  # Linux 6.1: the kernel engine needs 6.5
    "trixie": _KERNEL + _FUSE + _ROOTLESS + _CONTAINERS + _REST,
    "sid": _KERNEL + _FUSE + _ROOTLESS + _CONTAINERS + _REST,
}


def _about(machine: Machine) -> str:
    """What runs there, in one line."""
    script = "uname -r; runc --version | head -1; /opt/tests/bin/python --version; stat -fc %T /sys/fs/cgroup; systemctl is-system-running"
    return ", ".join(machine.run(script).stdout.decode(errors="replace").split("\n")).rstrip(", ")


def run(suite: str, arguments: list[str]) -> int:
    """Boot, install, test; the exit code of pytest.  Raise VmError."""
    began = time.monotonic()
    machine = Machine(make(suite))
    print(f"vm: {suite}: {time.monotonic() - began:.0f} s to have the machine", flush=True)
    machine.boot()
    try:
        machine.install()
        print(f"vm: {suite}: {time.monotonic() - began:.0f} s until the wheel was there: {_about(machine)}", flush=True)
        named = [one for one in arguments if not one.startswith("-")]
        tests = [one for one in arguments if one.startswith("-")] + (named or [f"tests/{name}" for name in TESTS[suite]])
        quoted = " ".join("'" + one.replace("'", "'\\''") + "'" for one in tests)
        environment = f"CI=1 PYTHONUNBUFFERED=1 CAFS_TEST_SLOW={SLOWER} PATH=/opt/tests/bin:$PATH"
        script = f"cd /root/tree && {environment} {PYTHON} -m pytest -q -n 2 --dist loadfile -p no:cacheprovider --color=no {quoted} 2>&1"
        code = subprocess.run(machine.command(script), stdin=subprocess.DEVNULL, check=False).returncode
    finally:
        machine.stop()
    print(f"vm: {suite}: exit code {code} after {time.monotonic() - began:.0f} s", flush=True)
    return code


def lacks_qemu() -> int | None:
    """The exit code where no machine can be run, None where one can."""
    lacking = missing()
    if not lacking:
        return None
    print(f"vm: NOT RUN: no {', '.join(lacking)} on this host (apt install qemu-system-x86 qemu-utils debootstrap)", flush=True)
    return 1 if os.environ.get("VMTEST") == "required" else 0


def main(words: list[str]) -> int:
    if not words or words[0] not in SUITES:
        print(__doc__, file=sys.stderr)
        return 2
    code = lacks_qemu()
    if code is not None:
        return code
    try:
        return run(words[0], words[1:])
    except VmError as error:
        print(f"vm: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent.parent)
    sys.exit(main(sys.argv[1:]))
