from __future__ import annotations

from pathlib import Path

import pytest

from tierd.errors import BudgetTooLarge, BudgetTooSmall
from tierd.io.memory_limits import (
    Limit,
    auto_budget,
    available_bytes,
    available_for,
    check_budget,
    check_least,
)
from tierd.io.pages import PageKind, Pages

MIB = 1 << 20
GIB = 1 << 30
NO_LIMIT_V1 = 9223372036854771712


class Machine:
    """A root directory with the files of /proc and /sys/fs/cgroup that limits are read from."""

    def __init__(self, root: Path, available: int) -> None:
        self.root = root
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/meminfo").write_text(
            f"MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:   {available >> 10} kB\nHugePages: 0\n"
        )
        self.member("")
        self.mounts("")

    def member(self, lines: str) -> None:
        (self.root / "proc/self/cgroup").write_text(lines)

    def mounts(self, lines: str) -> None:
        root = "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        (self.root / "proc/self/mountinfo").write_text(root + lines)

    def v1(self, path: str, limit: int, used: int, cache: int = 0) -> None:
        group = self.root / "sys/fs/cgroup/memory" / path
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (group / "memory.usage_in_bytes").write_text(f"{used}\n")
        (group / "memory.stat").write_text(
            f"cache 1\ninactive_file 1\ntotal_inactive_file {cache // 2}\n"
            f"total_active_file {cache - cache // 2}\n"
        )

    def v2(self, path: str, *, most: object, high: object = "max", used: int = 0) -> None:
        group = self.root / "sys/fs/cgroup" / path
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{most}\n")
        (group / "memory.high").write_text(f"{high}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 5\nactive_file {MIB}\ninactive_file {MIB}\n")


V1_MOUNT = "35 31 0:32 {root} {point} rw - cgroup cgroup rw,memory\n"
V2_MOUNT = "41 31 0:38 {root} {point} rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, available=10 * GIB)


@pytest.fixture
def v1(machine: Machine) -> Machine:
    machine.member("5:devices:/\n4:memory:/batch/job 7\n0::/\n")
    machine.mounts(V1_MOUNT.format(root="/", point="/sys/fs/cgroup/memory"))
    machine.v1(".", NO_LIMIT_V1, 20 * GIB)
    machine.v1("batch", NO_LIMIT_V1, GIB)
    machine.v1("batch/job 7", NO_LIMIT_V1, GIB)
    return machine


@pytest.fixture
def v2(machine: Machine) -> Machine:
    machine.member("0::/system.slice/tierd.service\n")
    machine.mounts(V2_MOUNT.format(root="/", point="/sys/fs/cgroup"))
    (machine.root / "sys/fs/cgroup").mkdir(parents=True)  # the top has no memory.max
    machine.v2("system.slice", most="max")
    machine.v2("system.slice/tierd.service", most="max")
    return machine


def test_without_cgroups_the_machine_is_the_limit(machine: Machine) -> None:
    assert available_bytes(machine.root) == Limit(
        10 * GIB, "the machine: MemAvailable in /proc/meminfo"
    )


def test_groups_without_a_limit_do_not_limit(v1: Machine) -> None:
    assert available_bytes(v1.root).nbytes == 10 * GIB


def test_groups_of_v2_without_a_limit_do_not_limit(v2: Machine) -> None:
    assert available_bytes(v2.root).nbytes == 10 * GIB


def test_our_own_group_limits_less_what_is_used(v1: Machine) -> None:
    v1.v1("batch/job 7", 4 * GIB, GIB)
    limit = available_bytes(v1.root)
    assert limit.nbytes == 3 * GIB
    assert str(v1.root / "sys/fs/cgroup/memory/batch/job 7") in limit.text
    assert "memory.limit_in_bytes 4.0 GiB, 1.0 GiB in use" in limit.text


def test_file_cache_can_be_dropped_and_counts_as_free(v1: Machine) -> None:
    v1.v1("batch/job 7", 4 * GIB, 4 * GIB, cache=3 * GIB)
    assert available_bytes(v1.root).nbytes == 3 * GIB


def test_an_ancestor_may_be_the_tightest(v1: Machine) -> None:
    v1.v1("batch/job 7", 4 * GIB, GIB)
    v1.v1("batch", 5 * GIB, 3 * GIB)
    limit = available_bytes(v1.root)
    assert limit.nbytes == 2 * GIB
    assert limit.text.startswith(f"memory cgroup {v1.root}/sys/fs/cgroup/memory/batch:")


def test_the_top_group_counts_too(v1: Machine) -> None:
    v1.v1(".", 21 * GIB, 20 * GIB)
    assert available_bytes(v1.root).nbytes == GIB


def test_a_group_beside_ours_does_not_count(v1: Machine) -> None:
    v1.v1("other", 1 * MIB, 1 * MIB)
    assert available_bytes(v1.root).nbytes == 10 * GIB


def test_a_group_that_is_over_its_limit_has_nothing_left(v1: Machine) -> None:
    v1.v1("batch/job 7", GIB, 2 * GIB)
    assert available_bytes(v1.root).nbytes == 0


@pytest.mark.parametrize(("most", "high"), [(4 * GIB, "max"), ("max", 4 * GIB), (5 * GIB, 4 * GIB)])
def test_memory_max_and_memory_high_both_limit(v2: Machine, most: object, high: object) -> None:
    v2.v2("system.slice/tierd.service", most=most, high=high, used=GIB)
    limit = available_bytes(v2.root)
    assert limit.nbytes == 3 * GIB + 2 * MIB
    assert f"memory.{'max' if high == 'max' else 'high'} 4.0 GiB" in limit.text


def test_an_ancestor_of_v2_may_be_the_tightest(v2: Machine) -> None:
    v2.v2("system.slice/tierd.service", most=4 * GIB)
    v2.v2("system.slice", most=3 * GIB, used=2 * GIB)
    assert available_bytes(v2.root).nbytes == GIB + 2 * MIB


def test_on_a_hybrid_system_only_the_hierarchy_with_the_controller_counts(v1: Machine) -> None:
    v1.mounts(
        V1_MOUNT.format(root="/", point="/sys/fs/cgroup/memory")
        + V2_MOUNT.format(root="/", point="/sys/fs/cgroup/unified")
    )
    (v1.root / "sys/fs/cgroup/unified").mkdir(parents=True)
    v1.v1("batch", 2 * GIB, GIB)
    assert available_bytes(v1.root).nbytes == GIB


def test_in_a_container_the_mount_shows_its_own_part_of_the_tree(machine: Machine) -> None:
    machine.member("4:memory:/docker/abc/inner\n")
    machine.mounts(V1_MOUNT.format(root="/docker/abc", point="/sys/fs/cgroup/memory"))
    machine.v1(".", 3 * GIB, GIB)
    machine.v1("inner", NO_LIMIT_V1, 0)
    assert available_bytes(machine.root).nbytes == 2 * GIB


@pytest.mark.parametrize("path", ["/elsewhere/x", "/../other", "/../../.."])
def test_a_path_that_cannot_be_seen_means_the_top_of_what_can(machine: Machine, path: str) -> None:
    machine.member(f"4:memory:{path}\n")
    machine.mounts(V1_MOUNT.format(root="/", point="/sys/fs/cgroup/memory"))
    machine.v1(".", 3 * GIB, GIB)
    assert available_bytes(machine.root).nbytes == 2 * GIB


def test_a_mount_point_with_a_blank_is_found(machine: Machine) -> None:
    machine.member("4:memory:/\n")
    machine.mounts(V1_MOUNT.format(root="/", point="/sys/fs/cgroup/memory/my\\040groups"))
    machine.v1("my groups", 3 * GIB, GIB)
    assert available_bytes(machine.root).nbytes == 2 * GIB


def test_controllers_that_share_a_mount_are_told_apart(machine: Machine) -> None:
    machine.member("4:cpu,memory:/a\n3:cpuset:/b\n")
    machine.mounts(
        "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,cpu,memory\n"
        "36 31 0:33 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    )
    machine.v1("a", 3 * GIB, GIB)
    assert available_bytes(machine.root).nbytes == 2 * GIB


def test_this_machine_has_some_memory_left() -> None:
    limit = available_bytes()
    assert MIB < limit.nbytes < 1 << 50
    assert limit.text


def test_a_budget_above_the_limit_is_refused_with_both_numbers() -> None:
    limit = Limit(GIB, "memory cgroup /x: memory.max 2.0 GiB, 1.0 GiB in use")
    check_budget(GIB, limit)
    with pytest.raises(BudgetTooLarge) as caught:
        check_budget(GIB + 1, limit)
    text = str(caught.value)
    assert f"{GIB + 1} bytes" in text
    assert f"{GIB} bytes" in text
    assert limit.text in text


@pytest.mark.parametrize("kind", [PageKind.SMALL, PageKind.SHMEM_THP])
def test_pages_of_the_system_come_from_what_is_available(machine: Machine, kind: PageKind) -> None:
    assert available_for(Pages(kind, ""), machine.root) == available_bytes(machine.root)


def test_a_budget_below_one_page_is_refused_with_both_numbers() -> None:
    check_least(2 * MIB, 2 * MIB)
    with pytest.raises(BudgetTooSmall, match=r"1\.0 MiB \(1048576 .*, 2\.0 MiB \(2097152 bytes\)"):
        check_least(MIB, 2 * MIB)


def test_reserved_pages_are_no_part_of_what_is_available_and_end_where_they_end(
    machine: Machine,
) -> None:
    with (machine.root / "proc/meminfo").open("a") as file:
        file.write("HugePages_Free: 9000\nHugePages_Rsvd: 808\nHugepagesize:    2048 kB\n")
    limit = available_for(Pages(PageKind.HUGETLB, ""), machine.root)
    assert limit.nbytes == (9000 - 808) * 2 * MIB == 16 * GIB > available_bytes(machine.root).nbytes
    with pytest.raises(BudgetTooLarge, match=r"16\.0 GiB .*reserved 2 MiB pages: HugePages_Free"):
        check_budget(16 * GIB + 1, limit)


def test_what_an_earlier_daemon_holds_is_not_taken_twice() -> None:
    limit = Limit(GIB, "the machine")
    check_budget(3 * GIB, limit, held_bytes=2 * GIB)
    with pytest.raises(BudgetTooLarge, match=r"2\.0 GiB \(2147483648 bytes\) of it held already"):
        check_budget(3 * GIB + 1, limit, held_bytes=2 * GIB)


def test_auto_takes_half_of_what_is_available_in_whole_huge_pages() -> None:
    assert auto_budget(Limit(10 * GIB + 3 * MIB, "x")) == 5 * GIB
    assert auto_budget(Limit(10 * GIB, "x"), held_bytes=2 * GIB) == 6 * GIB


def test_auto_refuses_when_half_is_nothing() -> None:
    with pytest.raises(BudgetTooLarge, match=r"half of 3\.0 MiB \(3145728 bytes\) \(the machine\)"):
        auto_budget(Limit(3 * MIB, "the machine"))


CGROUP_V1 = Path("/sys/fs/cgroup/memory")


def test_a_real_memory_cgroup_is_seen(tmp_path: Path) -> None:
    """The kernel's own files, of a group that we may make: our /proc/self/cgroup is replaced."""
    group = CGROUP_V1 / f"tierd-test-{tmp_path.name}"
    if not (CGROUP_V1 / "memory.limit_in_bytes").exists():
        pytest.skip("no memory cgroup v1 on this machine")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"memory cgroups cannot be made here: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(64 * MIB))
        fake = Machine(tmp_path, available=10 * GIB)
        fake.member(f"4:memory:/{group.name}\n")
        fake.mounts(V1_MOUNT.format(root="/", point="/sys/fs/cgroup/memory"))
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/memory").symlink_to(CGROUP_V1)
        assert available_bytes(tmp_path).nbytes == 64 * MIB
    finally:
        group.rmdir()
