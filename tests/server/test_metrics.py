"""The series of the contract, with the right values and no client's words in a label."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from carpool.engine.stats import CacheStats, ResultStats
from carpool.server.metrics import SECONDS, Tallies
from serving import Served

NAMES = {
    "carpool_requests",
    "carpool_request_seconds",
    "carpool_prompt_tokens",
    "carpool_running_requests",
    "carpool_queue_tokens",
    "carpool_queue_sequences",
    "carpool_batch_tokens",
    "carpool_batch_sequences",
    "carpool_stage_seconds",
    "carpool_cancelled",
    "carpool_stalled_clients",
    "carpool_build_info",
}
NAMES_WITH_A_CACHE = {
    "carpool_prefix_cache_queried_tokens",
    "carpool_prefix_cache_hit_tokens",
    "carpool_kv_cache_used_ratio",
}
NAMES_WITH_RESULTS = {
    "carpool_result_cache_hits",
    "carpool_result_cache_misses",
    "carpool_result_cache_bytes",
}


async def scrape(served: Served) -> dict[str, float]:
    text = (await served.get("/metrics")).body.decode()
    return {
        sample.name
        + str(sorted(value for key, value in sample.labels.items() if key != "model_name")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_names_are_the_contracts(served: Served) -> None:
    for stats, results, names in (
        (None, None, NAMES),
        (CacheStats(0, 0, 1, 0), None, NAMES | NAMES_WITH_A_CACHE),
        (None, ResultStats(0, 0, 0, 1), NAMES | NAMES_WITH_RESULTS),
    ):
        served.engine.cache_stats, served.engine.result_stats = stats, results
        text = (await served.get("/metrics")).body.decode()
        families = [f for f in text_string_to_metric_families(text) if f.name.startswith("carpool_")]
        assert {family.name for family in families} == names
        for family in families:
            for sample in family.samples:
                assert sample.labels["model_name"] == "all-MiniLM-L6-v2"


async def test_a_request_is_counted_with_its_tokens_and_stages(served: Served) -> None:
    await served.embed(input=["hi", "you"])
    await served.embed(input=[])
    await served.get("/some/users/words")
    series = await scrape(served)
    assert series["carpool_requests_total['/v1/embeddings', '200']"] == 1
    assert series["carpool_requests_total['/v1/embeddings', '400']"] == 1
    assert series["carpool_requests_total['404', 'other']"] == 1
    assert series["carpool_request_seconds_count['/v1/embeddings']"] == 2
    assert series["carpool_prompt_tokens_total[]"] == 9
    assert series["carpool_batch_tokens_sum[]"] == 9
    assert series["carpool_batch_sequences_sum[]"] == 2
    assert series["carpool_stage_seconds_sum['tokenize']"] == 0.001
    assert series["carpool_stage_seconds_sum['queue']"] == 0.002
    assert series["carpool_stage_seconds_sum['forward']"] == 0.003
    assert series["carpool_stage_seconds_count['encode']"] == 1


async def test_gauges_read_the_engine(served: Served) -> None:
    served.engine.waiting_tokens, served.engine.waiting_sequences = 70, 3
    series = await scrape(served)
    assert (series["carpool_queue_tokens[]"], series["carpool_queue_sequences[]"]) == (70, 3)
    assert series["carpool_cancelled_total[]"] == 0
    served.engine.waiting_tokens = served.engine.waiting_sequences = 0


async def test_the_cache_tells_what_it_was_asked_and_what_it_had(served: Served) -> None:
    served.engine.cache_stats = CacheStats(queried_tokens=100, hit_tokens=48, num_blocks=8, used_blocks=2)
    series = await scrape(served)
    assert series["carpool_prefix_cache_queried_tokens_total[]"] == 100
    assert series["carpool_prefix_cache_hit_tokens_total[]"] == 48
    assert series["carpool_kv_cache_used_ratio[]"] == 0.25
    served.engine.cache_stats = CacheStats(queried_tokens=150, hit_tokens=48, num_blocks=8, used_blocks=0)
    series = await scrape(served)
    assert series["carpool_prefix_cache_queried_tokens_total[]"] == 150
    assert series["carpool_kv_cache_used_ratio[]"] == 0


async def test_the_kept_results_tell_how_often_they_were_asked_for_and_what_they_take(served: Served) -> None:
    served.engine.result_stats = ResultStats(hits=7, misses=3, num_bytes=4096, max_bytes=8192)
    series = await scrape(served)
    assert series["carpool_result_cache_hits_total[]"] == 7
    assert series["carpool_result_cache_misses_total[]"] == 3
    assert series["carpool_result_cache_bytes[]"] == 4096


async def test_a_model_of_any_name_is_a_route_not_a_label(served: Served) -> None:
    await served.get("/v1/models/whatever-a-user-types")
    assert (await scrape(served))["carpool_requests_total['/v1/models/{model}', '404']"] == 1


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([*SECONDS, 0.0, 61.0]) | st.floats(0.0, 99.0)))
)
def test_our_histograms_are_written_as_the_librarys_own(observations: list[tuple[str, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tallies = Tallies("seconds", "How long.", SECONDS, ("stage",))
    ours.register(tallies)
    histogram = Histogram("seconds", "How long.", ("stage",), registry=theirs, buckets=SECONDS)
    for stage, seconds in observations:
        tallies.labels(stage).observe(seconds)
        histogram.labels(stage).observe(seconds)
    assert generate_latest(ours) == generate_latest(theirs)
