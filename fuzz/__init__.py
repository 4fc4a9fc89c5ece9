"""Properties that must be true for every input: written once, in ``properties``, and tried by two drivers.

``tests/unit/test_properties.py`` tries them with hypothesis and with the inputs in ``corpus/``, in every run of the
tests. ``python -m fuzz`` tries them with atheris, which watches the code that runs and changes the inputs until they
reach more of it. It needs ``pip install '.[fuzz]'``. Nothing here is installed with the package.
"""
