"""Private API of other libraries, a file for each: an upgrade breaks this room only.

Every function says what it uses, why public API does not do, and what shows when it breaks.
``tests/project/test_private_api.py`` sees that no other room touches such names.
"""
