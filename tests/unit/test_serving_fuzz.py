"""The server fuzzed by its own OpenAPI description: valid and invalid requests, none of which is a server's error."""

from base64 import b64encode

import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]")
pytest.importorskip("schemathesis", reason="fuzzes")
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from served import png, served

from skipnet_rt.data import digits_pictures
from skipnet_rt.serving import Predictor, Settings

PICTURES = [png(picture) for picture in digits_pictures(held_out=True)[0][:4]]
EXAMPLES = 120  # of the predictions' requests; a tenth of it of each other path


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_fuzz():
    binary = st.sampled_from(PICTURES) | st.binary(max_size=200)
    schemathesis.openapi.format("binary", binary)
    schemathesis.openapi.format("byte", binary.map(lambda file: b64encode(file).decode()))
    statuses: dict[int, int] = {}
    with served(Predictor(), Settings(max_images=4, max_pixels=10_000, max_body=50_000)) as server:
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
        operations = [operation.ok() for operation in schema.get_all_operations()]
        assert len(operations) == 5
        for operation in operations:
            predicts = operation.path == "/v1/predict"  # the others take nothing that could be wrong
            for mode in schemathesis.GenerationMode if predicts else (schemathesis.GenerationMode.POSITIVE,):
                @settings(max_examples=EXAMPLES if predicts else EXAMPLES // 10, deadline=None, derandomize=True,
                          database=None, suppress_health_check=list(HealthCheck))
                @given(case=operation.as_strategy(generation_mode=mode))
                def fuzz(case):
                    response = case.call(timeout=60)
                    # The valid by the schema may still be refused: bytes are seldom a picture. 413 refuses, too.
                    excluded = [positive_data_acceptance]
                    if response.status_code == 413:
                        excluded.append(negative_data_rejection)
                    case.validate_response(response, excluded_checks=excluded)
                    statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

                fuzz()
        assert server.predict(PICTURES[0]).status == 200
    assert {200, 400, 422} <= set(statuses), statuses
    assert not [status for status in statuses if status >= 500]
