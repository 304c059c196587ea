"""Which draws a process records, when, and what it trains on."""

import torch

from diffusers_tbcm.draws import prompt_at
from diffusers_tbcm.rows import Recording
from diffusers_tbcm.text import Text
from diffusers_tbcm.training.stream import RowStream


def recording(draws):
    """One place a draw; its latent is the draw's number."""
    numbers = torch.tensor(draws, dtype=torch.float32)[:, None]
    text = Text.unmasked(numbers[:, None])
    return Recording(numbers[:, None], numbers[:, None], numbers + 1, numbers, text, numbers[:, 0])


def make_stream(record, **changes):
    options = {
        "rows_per_prompt": 1,
        "num_prompts": 5,
        "batch_size": 2,
        "recorded_at_once": 2,
        "buffer_size": 0,
        "replay_steps": 1,
        "ahead": 2,
        "seed": 0,
        "num_processes": 1,
        "process_index": 0,
    }
    return RowStream(record, **(options | changes))


def keep_all(draws):
    return recording(draws), torch.ones(len(draws), dtype=torch.bool)


def numbers(rows):
    return rows.latents.flatten().tolist()


def test_processes_share_the_draws_of_one():
    def draws(processes, batch, number):
        streams = [
            make_stream(keep_all, batch_size=batch, num_processes=processes, process_index=index)
            for index in range(processes)
        ]
        return [draw for stream in streams for draw in stream.draws(number)]

    assert [draws(2, 2, number) for number in range(3)] == [draws(1, 4, number) for number in range(3)]


def test_rows_come_in_order_and_a_larger_recording_gives_the_same():
    for at_once in (2, 4, 6):
        stream = make_stream(keep_all, recorded_at_once=at_once)
        stream.start(1, 4)
        assert [numbers(stream.rows(step)[0]) for step in (1, 2, 3)] == [[2, 3], [4, 5], [6, 7]]


def test_recordings_are_made_ahead_and_none_past_the_end():
    recorded = []
    stream = make_stream(lambda draws: recorded.append(draws) or keep_all(draws))
    stream.start(0, 3)
    assert recorded == [[0, 1], [2, 3]]
    stream.rows(0)
    assert len(recorded) == 2
    stream.prefetch()
    assert recorded[2:] == [[4, 5]]
    stream.rows(1)
    stream.prefetch()
    assert len(recorded) == 3


def test_what_is_dropped_is_counted_and_a_batch_without_rows_keeps_in_step():
    def keep_none_of_the_first(draws):
        return recording(draws), torch.tensor([draw >= 2 for draw in draws])

    stream = make_stream(keep_none_of_the_first)
    stream.start(0, 2)
    rows, kept = stream.rows(0)
    assert kept == 0 and numbers(rows) == [0, 1] and stream.dropped == 2
    rows, kept = stream.rows(1)
    assert kept == 2 and numbers(rows) == [2, 3] and stream.dropped == 0


def test_a_buffer_is_filled_again_after_a_resume():
    options = {"buffer_size": 6, "replay_steps": 2}
    straight, resumed = make_stream(keep_all, **options), make_stream(keep_all, **options)
    straight.start(0, 12)
    expected = [numbers(straight.rows(step)[0]) for step in range(12)]
    resumed.start(7, 12)
    assert [numbers(resumed.rows(step)[0]) for step in range(7, 12)] == expected[7:]
    assert resumed.number == straight.number == 6


def test_the_prompts_of_the_latest_micro_steps_are_named():
    stream = make_stream(keep_all, num_prompts=100)
    stream.start(0, 10)
    for step in range(3):
        stream.rows(step)
    assert stream.prompt_numbers(1) == [prompt_at(draw, 100, 0) for draw in (4, 5)]
    assert stream.prompt_numbers(2) == [prompt_at(draw, 100, 0) for draw in (2, 3, 4, 5)]
