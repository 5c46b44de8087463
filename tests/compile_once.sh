#!/bin/bash
# compile_once.sh COMPILER FOLDER ARGUMENT...: what COMPILER ARGUMENT... would make of one source file; copied from FOLDER
# where the same arguments have made it of the same files before.
set -e -o pipefail
compiler=$1 folder=$2 made='' sources=''
shift 2

rest=("$@")
for ((i = 0; i < $#; i++)); do
    case ${rest[i]} in
        -o) made=${rest[i + 1]}; unset "rest[i + 1]" ;;
        *.c) sources=${rest[i]%/*} ;;
    esac
done
if [ -z "$made" ] || [ -z "$sources" ]; then exec "$compiler" "$@"; fi  # It was asked for something else.
key=$({ echo "${rest[@]}"; cat "$sources"/*.[ch]; } | sha256sum | cut -c-64)

if [ ! -e "$folder/$key" ]; then
    "$compiler" "$@"
    cp "$made" "$folder/$key.$$"
    mv "$folder/$key.$$" "$folder/$key"  # Whole or not at all: others look for it at the same time.
fi
cp "$folder/$key" "$made"
