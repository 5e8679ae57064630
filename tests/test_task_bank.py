"""TaskBank: fixed slots that never move, least recently used first, no row of another task at any time."""

import threading
import time
from contextlib import nullcontext

import pytest
import torch

import peft_ops
from peft_ops._checks import check_table
from peft_ops._library import has_native
from peft_ops.nn import TaskBank
from peft_ops.nn.slot_tables import HostTask, SlotTables
from tests.conftest import DEVICE, INTERPRET, KERNELS

WIDTHS = {"k": 5, "v": 16, "down": 33}
pytestmark = pytest.mark.kernels
fast = pytest.mark.skipif(INTERPRET, reason="runs no kernel")


def vectors(value: float, widths=WIDTHS) -> dict[str, torch.Tensor]:
    return {module: torch.full((width,), float(value)) for module, width in widths.items()}


def bank_of(slots: int, names="abc", widths=WIDTHS, **kwargs) -> TaskBank:
    """Task "a" holds 2 everywhere, "b" 3, "c" 4, ..."""
    bank = TaskBank(slots, widths, device=DEVICE, **kwargs)
    for name in names:
        bank.put(name, vectors(value_of(name), widths))
    return bank


def value_of(name: str) -> float:
    return ord(name[0]) - ord("a") + 2.0


def row(bank: TaskBank, task_id, module="v") -> torch.Tensor:
    return bank.table(module)[int(task_id)].cpu()


def served(bank: TaskBank, rows, **kwargs) -> list[float]:
    """One number per row: the value of its task, 1 for the base model; every feature of every module agrees."""
    with bank.use(rows, **kwargs) as ids:
        return [numbers_of(bank, int(t)) for t in ids]


def numbers_of(bank: TaskBank, task_id: int) -> float:
    at = bank.slots if task_id == -1 else task_id
    found = torch.cat([bank.rows(module)[at].cpu() for module in bank.widths]).unique()
    assert len(found) == 1, found
    return found.item()


@fast
class TestSlots:
    def test_rows_are_their_tasks(self):
        bank = bank_of(3)
        with bank.use(["c", None, "a", "__base__", "c"]) as ids:
            assert ids.dtype == torch.int64 and ids.device.type == DEVICE and ids.shape == (5,)
            assert ids[1] == ids[3] == -1 and ids[0] == ids[4] != ids[2]
        assert served(bank, ["c", None, "a", "b"]) == [4, 1, 2, 3]
        assert served(bank, []) == [] and served(bank, [None]) == [1]

    def test_base_and_bad_rows_and_empty_slots(self):
        bank = bank_of(2)
        assert bank.rows("k").shape == (4, 5) and bank.table("k").shape == (2, 5)
        assert torch.equal(bank.rows("k")[2].cpu(), torch.ones(5)) and bank.rows("k")[3].isnan().all()
        assert bank.table("down").isnan().all(), "an empty slot must not pass for a task"

    def test_absent_modules_are_ones(self):
        bank = bank_of(1, "")
        bank.put("some", {"v": torch.full((16, 1), 7.0)})
        with bank.use(["some"]) as ids:
            assert torch.equal(row(bank, ids[0]), torch.full((16,), 7.0))
            assert torch.equal(row(bank, ids[0], "down"), torch.ones(33))

    def test_peft_shapes_and_dtypes(self):
        bank = TaskBank(1, {"k": 3, "down": 4}, torch.bfloat16, DEVICE)
        bank.put(
            "x", {"k": torch.tensor([[1.5], [2.0], [0.0]]), "down": torch.tensor([[1.0, -2.0, 3.0, 4.0]]).double()}
        )
        with bank.use(["x"]) as ids:
            assert row(bank, ids[0], "k").tolist() == [1.5, 2, 0] and row(bank, ids[0], "k").dtype == torch.bfloat16
            assert row(bank, ids[0], "down").tolist() == [1, -2, 3, 4]

    def test_least_recently_used_goes_first(self):
        bank = bank_of(3, "abcde")
        for rows in ("ab", "c", "a", "d"):  # b is the one whose use is the longest ago
            assert served(bank, list(rows)) == [value_of(name) for name in rows]
        assert bank.stats.misses == 4 and bank.stats.hits == 1 and bank.stats.evictions == 1
        served(bank, ["a", "c", "d"])
        assert bank.stats.hits == 4, "another task than b had to go"
        served(bank, ["b"])
        assert bank.stats.evictions == 2

    def test_a_task_of_the_batch_is_never_evicted_for_another(self):
        bank = bank_of(2, "abc")
        served(bank, ["a"]), served(bank, ["b"])
        assert served(bank, ["c", "a"]) == [4, 2]  # a is the oldest, and in this batch
        assert bank.stats.evictions == 1 and bank.stats.hits == 1

    def test_tasks_in_use_keep_their_slots(self):
        bank = bank_of(3, "abcdef")
        with bank.use(["a", "b"]) as ids:
            before = [row(bank, t) for t in ids]
            for name in "cdefcdef":
                assert served(bank, [name]) == [value_of(name)]
            assert all(torch.equal(row(bank, t), kept) for t, kept in zip(ids, before, strict=True))
            with bank.use(["b", "c"]) as inner:
                assert inner[0] == ids[1]
            assert numbers_of(bank, int(ids[1])) == 3, "the inner block gave up what the outer one uses"

    def test_an_error_in_the_block_gives_the_slots_back(self):
        bank = bank_of(1)
        with pytest.raises(ZeroDivisionError), bank.use(["a"]):
            _ = 1 / 0
        assert served(bank, ["b"]) == [3]

    def test_nothing_moves_and_nothing_is_allocated_again(self):
        bank = bank_of(2, "abcdefgh", num_virtual_tokens=2, token_dim=4)
        tensors = [*(bank.table(m) for m in WIDTHS), bank.rows("k"), bank.prompts, bank.prompt_lengths]
        before = [t.data_ptr() for t in tensors]
        for first, second in zip("abcdefgh", "bcdefgha", strict=True):
            served(bank, [first, second])
        bank.put("a", vectors(9))
        bank.remove("b")
        bank.prefetch(["a", "c"])
        after = [*(bank.table(m) for m in WIDTHS), bank.rows("k"), bank.prompts, bank.prompt_lengths]
        assert [t.data_ptr() for t in after] == before
        assert served(bank, ["a", "c"]) == [9, 4]

    def test_swaps_leave_what_autograd_saved(self):
        """Another slot is written between a forward and its backward; this one is in use and cannot be."""
        bank = bank_of(2)
        x = torch.randn(2, 16, device=DEVICE, requires_grad=True)
        with bank.use(["a"]) as ids:
            y = x * bank.table("v")[ids]
            served(bank, ["b"]), served(bank, ["c"])
            y.sum().backward()
        assert torch.equal(x.grad.cpu(), torch.full((2, 16), 2.0))

    def test_made_and_used_in_inference_mode(self):
        with torch.inference_mode():
            bank = bank_of(1, "ab")
            assert served(bank, ["a"]) == [2]
        assert not bank.table("k").is_inference() and not bank.table("k").requires_grad
        assert served(bank, ["b"]) == [3]


@fast
class TestPutAndRemove:
    def test_a_new_version_waits_for_batches_in_flight(self):
        bank = bank_of(2, "a")
        with bank.use(["a"]) as old:
            bank.put("a", vectors(50))
            assert numbers_of(bank, int(old[0])) == 2, "changed under a batch"
            with bank.use(["a"]) as new:
                assert new[0] != old[0] and numbers_of(bank, int(new[0])) == 50
                assert numbers_of(bank, int(old[0])) == 2
            assert numbers_of(bank, int(new[0])) == 50
        assert bank.table("k")[int(old[0])].isnan().all(), "the old version's slot is free"
        assert served(bank, ["a"]) == [50] and bank.names() == ["a"]

    def test_remove(self):
        bank = bank_of(2, "ab")
        with bank.use(["a", "b"]) as ids:
            bank.remove("a")
            assert "a" not in bank and len(bank) == 1 and bank.names() == ["b"]
            assert numbers_of(bank, int(ids[0])) == 2
        assert bank.table("v")[int(ids[0])].isnan().all() and numbers_of(bank, int(ids[1])) == 3
        with pytest.raises(KeyError, match="must be of a task that was put, got 'a'"), bank.use(["a"]):
            pass
        with pytest.raises(KeyError, match="TaskBank.remove.*got 'a'"):
            bank.remove("a")
        bank.remove("b")
        assert bank.table("v").isnan().all() and not bank

    def test_what_is_given_is_copied(self):
        given = vectors(5)
        bank = bank_of(1, "")
        bank.put("x", given)
        given["v"].zero_()
        assert served(bank, ["x"]) == [5]

    def test_a_refused_put_changes_nothing(self):
        bank = bank_of(1, "a")
        with pytest.raises(ValueError):
            bank.put("a", {"v": torch.full((16,), float("inf"))})
        assert served(bank, ["a"]) == [2]


@fast
class TestPrompts:
    def bank(self, slots=2):
        bank = TaskBank(slots, {"k": 2}, device=DEVICE, num_virtual_tokens=3, token_dim=4)
        for length, name in enumerate("xyz", 1):
            bank.put(name, {}, torch.full((length, 4), float(length)))
        bank.put("plain", {"k": torch.tensor([2.0, 3.0])})
        return bank

    def test_lengths_and_rows(self):
        bank = self.bank()
        for name, length in (("z", 3), ("y", 2), ("x", 1), ("plain", 0), ("y", 2)):
            with bank.use([name]) as ids:
                assert bank.prompt_lengths.dtype == torch.int32 and bank.prompt_lengths[int(ids[0])] == length
                prompt = bank.prompts[int(ids[0])].cpu()
                assert (prompt[:length] == length).all() and (prompt[length:] == 0).all(), "a row of the task before"

    def test_operator(self):
        bank = self.bank(3)
        embedding, tokens = torch.randn(10, 4, device=DEVICE), torch.randint(0, 10, (4, 5), device=DEVICE)
        with bank.use(["y", None, "plain", "z"]) as ids:
            out = peft_ops.prompt_concat(tokens, embedding, bank.prompts, ids, prompt_lengths=bank.prompt_lengths)
        assert out.attention_mask.sum(1).tolist() == [7, 5, 5, 8]
        assert (out.inputs_embeds[0, :2] == 2).all() and (out.inputs_embeds[3, :3] == 3).all()
        assert torch.equal(out.inputs_embeds[1, :5], embedding[tokens[1]])
        assert not out.inputs_embeds.isnan().any()

    def test_prompts_alone(self):
        bank = TaskBank(1, {}, device=DEVICE, num_virtual_tokens=1, token_dim=2)
        bank.put("x", {}, torch.ones(1, 2))
        with bank.use(["x"]) as ids:
            assert bank.prompts[int(ids[0])].tolist() == [[1, 1]]
        assert bank_of(1).prompts is None and bank_of(1).prompt_lengths is None


@fast
class TestLoader:
    def test_loads_on_demand(self):
        asked = []
        bank = bank_of(2, "", loader=lambda name: (asked.append(name), (vectors(value_of(name)), None))[1])
        assert "a" not in bank
        assert served(bank, ["a", "b", "a"]) == [2, 3, 2] and served(bank, ["c"]) == [4]
        assert asked == ["a", "b", "c"] and bank.names() == ["a", "b", "c"] and "a" in bank
        assert served(bank, ["a"]) == [2] and bank.stats.loads == 3, "the host copy was not used"

    def test_host_capacity(self):
        bank = bank_of(1, "", loader=lambda name: (vectors(value_of(name)), None), host_capacity=2)
        bank.put("p", vectors(100))
        one = TaskBank(1, WIDTHS).stats.host_bytes, bank.stats.host_bytes
        for name in "abacada":
            assert served(bank, [name]) == [value_of(name)]
        assert bank.stats.loads == 4, "a, used each time, has to stay"
        assert bank.stats.host_bytes == 3 * one[1] and one[0] == 0
        assert served(bank, ["p"]) == [100] and bank.stats.loads == 4, "what was put must stay"
        assert served(bank, ["b"]) == [3] and bank.stats.loads == 5

    def test_no_host_copies_at_all(self):
        bank = bank_of(2, "", loader=lambda name: (vectors(value_of(name)), None), host_capacity=0)
        assert served(bank, ["a", "b"]) == [2, 3] and served(bank, ["b", "c"]) == [3, 4]
        assert served(bank, ["a"]) == [2] and bank.stats.host_bytes == 0 and bank.stats.loads == 4
        assert sorted(bank.names()) == ["a", "c"]

    def test_what_it_raises_reaches_the_caller_and_holds_nothing(self):
        def loader(name):
            if name != "a":
                raise KeyError(f"no {name}")
            return vectors(2), None

        bank = bank_of(2, "", loader=loader)
        for _ in range(3):
            with pytest.raises(KeyError, match="no x"), bank.use(["a", "x"]):
                pass
        assert served(bank, ["a"]) == [2] and bank._pins == [0, 0] and not bank._loading

    def test_what_it_brings_is_checked(self):
        bank = bank_of(1, "", loader=lambda name: ({"q": torch.ones(3)}, None))
        with pytest.raises(ValueError, match="TaskBank.loader: vectors of 'a' must be of modules of the bank, got 'q'"):
            served(bank, ["a"])

    def test_removed_tasks_come_again(self):
        bank = bank_of(1, "", loader=lambda name: (vectors(value_of(name)), None))
        served(bank, ["a"]), bank.remove("a")
        assert "a" not in bank and served(bank, ["a"]) == [2] and bank.stats.loads == 2

    def test_one_call_for_many_threads(self):
        calls = []

        def loader(name):
            calls.append(name)
            time.sleep(0.05)
            return vectors(value_of(name)), None

        bank = bank_of(2, "", loader=loader)
        found = run_threads(8, lambda i: served(bank, ["a", "b"]))
        assert found == [[2, 3]] * 8 and sorted(calls) == ["a", "b"]

    def test_other_threads_go_on_while_it_loads(self):
        inside, go = threading.Event(), threading.Event()

        def loader(name):
            inside.set()
            assert go.wait(10)
            return vectors(value_of(name)), None

        bank = bank_of(2, "a", loader=loader)
        slow = threading.Thread(target=served, args=(bank, ["b"]))
        slow.start()
        assert inside.wait(10)
        assert served(bank, ["a"]) == [2]
        bank.put("b", vectors(70))
        go.set()
        slow.join(10)
        assert served(bank, ["b"]) == [70], "what was put while the loader read is newer"


@fast
class TestPrefetch:
    def test_hits_afterwards(self):
        bank = bank_of(2, "abc")
        assert bank.prefetch(["a", None, "b", "a"]) == 2 and bank.stats.misses == 0
        assert served(bank, ["a", "b"]) == [2, 3] and bank.stats.hits == 2 and bank.stats.misses == 0

    def test_makes_room_but_not_of_its_own(self):
        bank = bank_of(2, "abcd")
        served(bank, ["a", "b"])
        assert bank.prefetch(["c", "a"]) == 2  # b goes, a stays
        assert served(bank, ["a", "c"]) == [2, 4] and bank.stats.misses == 2

    def test_leaves_slots_in_use(self):
        bank = bank_of(2, "abcd")
        with bank.use(["a"]) as ids:
            assert bank.prefetch(["b", "c"]) == 1 and numbers_of(bank, int(ids[0])) == 2
            assert served(bank, ["b"]) == [3]
            with bank.use(["b"]):
                assert bank.prefetch(["c"]) == 0


def run_threads(count: int, work) -> list:
    found, errors = [None] * count, []

    def run(i):
        try:
            found[i] = work(i)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors[0]
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    return found


@fast
class TestThreads:
    @pytest.mark.parametrize("lazily", [False, True], ids=["put", "loader"])
    def test_eight_threads_with_batches_of_their_own(self, lazily):
        """12 tasks in 9 slots, batches of up to 3: threads wait for one another, and never see another's row."""
        names = "abcdefghijkl"
        extra = dict(loader=lambda name: (vectors(value_of(name)), None), host_capacity=3) if lazily else {}
        bank = bank_of(9, "" if lazily else names, **extra)

        def work(i):
            pick = torch.Generator().manual_seed(i)
            for _ in range(60):
                rows = [None, *(names[j] for j in torch.randint(0, 12, (3,), generator=pick))]
                want = [1.0, *(value_of(name) for name in rows[1:])]
                with bank.use(rows, timeout=30) as ids:
                    assert [numbers_of(bank, int(t)) for t in ids] == want
                    time.sleep(1e-4)
                    assert [numbers_of(bank, int(t)) for t in ids] == want
            return True

        assert all(run_threads(8, work))
        assert bank._pins == [0] * 9 and len(bank._idle) + len(bank._free) == 9

    def test_versions_change_under_eight_threads(self):
        """Each batch sees one version of a task from its start to its end, in every module."""
        bank = bank_of(6, "ab")

        def work(i):
            for step in range(60):
                if i == 0:
                    bank.put("a", vectors(100.0 + step))
                    if step % 5 == 0:
                        bank.remove("b")
                        bank.put("b", vectors(3))
                    continue
                try:
                    with bank.use(["a", "b"], timeout=30) as ids:
                        first = [numbers_of(bank, int(t)) for t in ids]
                        time.sleep(1e-4)
                        assert [numbers_of(bank, int(t)) for t in ids] == first and first[1] == 3
                        assert first[0] == 2 or 100 <= first[0] < 160
                except KeyError:  # between remove and put
                    pass
            return True

        assert all(run_threads(8, work))
        assert bank._pins == [0] * 6 and served(bank, ["a", "b"]) == [159, 3]

    def test_waits_for_a_slot(self):
        bank = bank_of(1, "ab")
        held, done = threading.Event(), threading.Event()

        def hold():
            with bank.use(["a"]):
                held.set()
                done.wait(10)

        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(10)
        with pytest.raises(RuntimeError, match="1 more tasks must find room in 1 slots"), bank.use(["b"], timeout=0.05):
            pass
        threading.Timer(0.05, done.set).start()
        assert served(bank, ["b"], timeout=10) == [3]
        thread.join(10)


def operator_calls(bank: TaskBank, task_ids) -> dict:
    """Each (IA)^3 operator on tables of the bank, as a call without arguments."""
    x, k, v, down = (torch.randn(s, device=DEVICE) for s in ((3, 2, 8), (5, 8), (16, 8), (8, 33)))
    gate, up = torch.randn(2, 3, 2, 33, device=DEVICE).unbind()
    wide, t = torch.randn(33, 8, device=DEVICE), bank.table
    return {
        "ia3_scale": lambda: peft_ops.ia3_scale(gate, t("down"), task_ids),
        "ia3_linear": lambda: peft_ops.ia3_linear(x, k, ia3_l=t("k"), task_ids=task_ids),
        "ia3_linear, input": lambda: peft_ops.ia3_linear(
            gate, down, ia3_l=t("down"), task_ids=task_ids, is_feedforward=True
        ),
        "ia3_kv_linear": lambda: peft_ops.ia3_kv_linear(x, k, v, k_ia3_l=t("k"), v_ia3_l=t("v"), task_ids=task_ids)[1],
        "ia3_glu": lambda: peft_ops.ia3_glu(gate, up, t("down"), task_ids),
        "ia3_glu_linear": lambda: peft_ops.ia3_glu_linear(x, wide, wide, ia3_l=t("down"), task_ids=task_ids),
    }


OPERATORS = ["ia3_scale", "ia3_linear", "ia3_linear, input", "ia3_kv_linear", "ia3_glu", "ia3_glu_linear"]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_take_the_tables(name):
    """The views of the buffer give bitwise what tables of their own give."""
    torch.manual_seed(1)
    bank = TaskBank(4, WIDTHS, device=DEVICE)
    for task in "abcdef":
        bank.put(task, {module: torch.randn(width) for module, width in WIDTHS.items()})
    with bank.use(list("fedcb"[:4])):
        pass
    with bank.use(["a", None, "e"]) as ids:
        torch.manual_seed(2)
        got = operator_calls(bank, ids)[name]()
        copies = {module: bank.table(module).contiguous().clone() for module in WIDTHS}
        assert not got.isnan().any()
        bank.table = copies.__getitem__
        torch.manual_seed(2)
        assert torch.equal(got, operator_calls(bank, ids)[name]())


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_kernels_read_the_table_where_it_lies(name, backend):
    if backend == "native" and not has_native() or backend == "triton" and not KERNELS:
        pytest.skip("not here")
    bank = bank_of(211, "abc")  # no other tensor here has 211 rows
    with bank.use(["a", None, "c"]) as ids, peft_ops.set_backend(backend):
        call = operator_calls(bank, ids)[name]
        call()
        with torch.profiler.profile(record_shapes=True) as seen:
            call()
            bank.table("k").clone()
    copies = [e for e in seen.events() if e.name in ("aten::clone", "aten::copy_", "aten::cat", "aten::_to_copy")]
    copied = [e.name for e in copies if any(list(s)[:1] == [211] for s in e.input_shapes)]
    assert copied == ["aten::clone", "aten::copy_"], "the table was copied, and not by the line above alone"


@fast
def test_tables_pass_the_checks_as_they_are():
    bank = bank_of(3)
    for module, width in WIDTHS.items():
        table, x = bank.table(module), torch.ones(2, width, device=DEVICE)
        passed = check_table("op", "ia3_l", table, width, x, True)
        assert passed.data_ptr() == table.data_ptr() and passed.stride() == table.stride()
        # what lets kernels load 128 bits at once
        assert table.data_ptr() % 16 == 0 and table.stride(0) % 16 == 0 and table.stride(1) == 1


class FakeStream:
    """Notes what a stream of a GPU would be given, in one list for all streams."""

    def __init__(self, name: str, log: list):
        self.name, self.cuda_stream, self.log = name, hash(name), log

    def record_event(self):
        self.log.append(event := FakeEvent(f"{self.name} {len(self.log)}"))
        return event

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event.name}")


class FakeEvent:
    def __init__(self, name: str):
        self.name, self.done = name, False

    def query(self) -> bool:
        return self.done


@fast
def test_writes_wait_for_readers_and_readers_for_writes(monkeypatch):
    """The order of streams, on streams that only take notes: a CPU has none."""
    log, tables = [], SlotTables(2, WIDTHS, torch.float32, "cpu", 0, 0)
    tables._stream, main, side = (FakeStream(name, log) for name in ("copies", "main", "side"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    task = HostTask(torch.ones(tables.row_size), None)

    def batch(stream, slots):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        tables.begin_reading(slots)
        tables.end_reading(slots)

    tables.write(0, task), tables.write(1, task)
    first, second = log
    batch(main, [0, 1]), batch(side, [1])
    assert log[2:4] == [f"main waits for {first.name}", f"main waits for {second.name}"]
    assert log[5] == f"side waits for {second.name}"
    by_main, by_side = log[4], log[6]
    tables.write(0, task), tables.wipe(1)
    third = log[8]
    assert log[7] == f"copies waits for {by_main.name}"
    assert log[9:11] == [f"copies waits for {by_main.name}", f"copies waits for {by_side.name}"]
    tables.write(1, task)  # nobody has read it since
    assert len(log) == 13 and isinstance(log[12], FakeEvent)
    third.done = True
    batch(main, [0]), batch(side, [0])
    assert [type(entry) for entry in log[13:]] == [FakeEvent, FakeEvent], "a write that is done needs no waiting"


@pytest.mark.skipif(DEVICE == "cpu", reason="streams and graphs")
class TestCuda:
    def test_a_captured_graph_serves_what_swaps_bring(self):
        bank = bank_of(2, "abcd")
        ids, x = torch.zeros(2, dtype=torch.int64, device="cuda"), torch.ones(2, 16, device="cuda")
        peft_ops.ia3_scale(x, bank.table("v"), ids)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = peft_ops.ia3_scale(x, bank.table("v"), ids)
        for pair in ("ab", "cd", "ad", "bc"):
            with bank.use(list(pair)) as batch:
                ids.copy_(batch)
                graph.replay()
            assert y[:, 0].tolist() == [value_of(name) for name in pair]

    def test_eviction_waits_for_the_batch_that_reads(self):
        bank = bank_of(1, "ab", {"v": 1 << 20})
        bank.prefetch(["a"])
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            with bank.use(["a"]) as ids:
                torch.cuda._sleep(200_000_000)
                y = bank.table("v")[ids].clone()
            with bank.use(["b"]):
                pass
        torch.cuda.synchronize()
        assert (y == 2).all() and served(bank, ["b"]) == [3]

    def test_not_inside_a_capture(self):
        bank = bank_of(1, "a")
        with pytest.raises(RuntimeError, match="must stand outside the capture"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()), bank.use(["a"]):
                pass


def bank(**kwargs):
    return TaskBank(2, {"layers.0.k": 3}, **kwargs)


def bank_with_prompts():
    return bank(num_virtual_tokens=2, token_dim=4)


@fast
def test_large_numbers_are_finite():
    """Their sum is not, in fp32, and it is asked first."""
    value, large = torch.tensor([3e38, 3e38, 3e38]), bank()
    large.put("x", {"layers.0.k": value})
    with large.use(["x"]) as ids:
        assert torch.equal(row(large, ids[0], "layers.0.k"), value)


@fast
@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: TaskBank(0, WIDTHS), ValueError, "slots must be at least 1, got 0"),
        (lambda: TaskBank(True, WIDTHS), TypeError, "slots must be an int, got bool"),
        (lambda: TaskBank(1, ["k"]), TypeError, "widths must be a mapping of modules to their features, got list"),
        (lambda: TaskBank(1, {"k": 0}), ValueError, r"widths\['k'\] must be at least 1, got 0"),
        (lambda: TaskBank(1, {}), ValueError, "widths must hold a module where there are no prompts, got {}"),
        (lambda: bank(dtype=torch.int8), TypeError, "dtype must be one of .*float32.*, got torch.int8"),
        (lambda: bank(num_virtual_tokens=2), ValueError, "token_dim must be at least 1, got 0"),
        (lambda: bank(host_capacity=3), ValueError, "host_capacity must be None without a loader, got 3"),
        (lambda: bank(loader=len, host_capacity=-1), ValueError, "host_capacity must be at least 0, got -1"),
        (lambda: bank().table("layers.0.q"), KeyError, "module must be .*'layers.0.q'; similar: 'layers.0.k'"),
        (lambda: bank().put(3, {}), TypeError, "name must be a name, got int"),
        (lambda: bank().put("__base__", {}), ValueError, "name must not be the base model's, got '__base__'"),
        (lambda: bank().put("x", [torch.ones(3)]), TypeError, "vectors must be a mapping .*, got list"),
        (
            lambda: bank().put("x", {"layers.0.q": torch.ones(3)}),
            ValueError,
            "vectors of 'x' must be of modules of the bank, got 'layers.0.q'; similar: 'layers.0.k'",
        ),
        (
            lambda: bank().put("x", {"layers.0.k": [1, 2, 3]}),
            TypeError,
            "'layers.0.k' of 'x' must be a tensor, got list",
        ),
        (lambda: bank().put("x", {"layers.0.k": torch.ones(3).int()}), TypeError, "must have dtype .*, got int32"),
        (lambda: bank().put("x", {"layers.0.k": torch.ones(4)}), ValueError, r"must have shape \[3\], got \[4\]"),
        (
            lambda: bank().put("x", {"layers.0.k": torch.tensor([1, float("nan"), 2])}),
            ValueError,
            "'layers.0.k' of 'x' must be finite in float32, got nan at 1",
        ),
        (
            lambda: bank(dtype=torch.float16).put("x", {"layers.0.k": torch.tensor([1, 2, 7e4])}),
            ValueError,
            "must be finite in float16, got 70000.0 at 2",
        ),
        (
            lambda: bank_with_prompts().put("x", {}, torch.full((1, 4), -float("inf"))),
            ValueError,
            "prompt .* got -inf at 0",
        ),
        (lambda: bank().put("x", {}, torch.ones(1, 4)), ValueError, r"shape \[p, 0\] with p from 1 to 0, got \[1, 4\]"),
        (
            lambda: bank_with_prompts().put("x", {}, torch.ones(3, 4)),
            ValueError,
            r"the prompt of 'x' must have shape \[p, 4\] with p from 1 to 2, got \[3, 4\]",
        ),
        (lambda: served(bank_of(2), list("abc")), ValueError, "must name at most 2 tasks, .*, got 3"),
        (lambda: bank_of(2).prefetch(list("abc")), ValueError, "prefetch: names must name at most 2 tasks, .*, got 3"),
        (lambda: served(bank_of(2), "ab"), TypeError, "rows must be a sequence of adapter names, got str"),
        (lambda: served(bank_of(2, ["reviews"]), ["revews"]), KeyError, "got 'revews'; similar: 'reviews'"),
        (lambda: bank_of(2).prefetch(["x"]), KeyError, "TaskBank.prefetch: .* got 'x'"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


@fast
def test_all_in_use_says_by_what():
    bank = bank_of(2, "abc")
    with bank.use(["a", "b"]), bank.use(["a"]), pytest.raises(RuntimeError) as raised, bank.use(["b", "c"]):
        pass
    assert "1 more tasks must find room in 2 slots" in str(raised.value)
    assert "'a' by 2, 'b' by 1" in str(raised.value)
    assert served(bank, ["c"]) == [4]


@fast
def test_statistics_and_repr():
    bank = bank_of(2, "abc")
    bytes_of_task = 4 * (16 + 16 + 48)  # columns begin at multiples of 16
    assert bank.stats == (0, 0, 0, 0, 0, 4 * bytes_of_task + 8, 3 * bytes_of_task)
    served(bank, ["a", "a", None]), served(bank, ["a", "b"]), served(bank, ["c"])
    assert bank.stats[:5] == (1, 3, 1, 0, 3 * bytes_of_task)
    assert repr(bank) == f"TaskBank(slots=2, modules=3, features=54, torch.float32, {bank.device}, tasks=3)"
    assert "prompts=[2, 3, 4]" in repr(TestPrompts().bank())
