from slidejax.bench import shapes


def test_presets():
    assert {"qwen2.5-7b", "llama-3-8b", "square-8192"} <= set(shapes.PRESETS)
    assert shapes.PRESETS["square-8192"] == ((8192, 8192),)
    assert shapes.default_preset() in shapes.PRESETS
