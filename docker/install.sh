#!/bin/sh
# /opt/oasst holds what docker/$1.txt pins and the project's own wheel. Byte code is compiled here, with hashes instead
# of dates: the file system is read-only at run time, and the same sources make the same bytes.
set -eu
install() { pip --python /opt/oasst/bin/python install --no-compile --no-deps "$@"; }
install --require-hashes -r "docker/$1.txt"
install /wheels/*.whl
ln -s /opt/oasst/lib/python3.*/site-packages/oasst_training/demo /opt/oasst/demo
/opt/oasst/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/oasst/lib
