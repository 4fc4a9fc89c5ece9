"""What must hold for every input there is: said once, in ``properties``, and tried by two drivers.

``tests/unit/test_properties.py`` tries it with hypothesis and with the inputs in ``corpus/``, in every run of the
tests. ``python -m fuzz`` tries it with atheris, which looks at the code it runs and changes the inputs until they reach
more of it; it takes ``pip install '.[fuzz]'``. Nothing here is part of what is installed.
"""
