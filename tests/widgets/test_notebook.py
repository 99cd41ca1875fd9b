from __future__ import annotations

import json

from explorer.widgets.notebook_path import app_notebook


def test_the_notebook_is_short_and_carries_no_outputs() -> None:
    notebook = json.loads(app_notebook().read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"]
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert 1 <= len(code) <= 5
    for cell in code:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        assert len(cell["source"]) <= 10
