package main

import (
	"bufio"
	"bytes"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
)

//go:embed sample
var sample embed.FS

// maxLine bounds a line of the input, and with it the memory that a bad file takes.
const maxLine = 1 << 20

// input is a file of JSON lines.
type input struct {
	io.ReadCloser
	size int64 // in bytes, 0 when nobody knows
}

// openInput opens the file at path, standard input for "-", or a file of the sample for "".
func openInput(path, fallback string, stdin io.Reader) (*input, error) {
	switch path {
	case "":
		f, err := sample.Open("sample/" + fallback)
		if err != nil {
			return nil, err
		}
		info, err := f.Stat()
		return &input{f, info.Size()}, err
	case "-":
		return &input{io.NopCloser(stdin), 0}, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if !info.Mode().IsRegular() {
		return &input{f, 0}, nil
	}
	return &input{f, info.Size()}, nil
}

// lines calls each for every line that is not blank, with its number and its length in the file. A line that is too long is
// passed on as nil.
func lines(r io.Reader, each func(number int, text []byte, length int64) error) error {
	in := bufio.NewReaderSize(r, maxLine)
	for number := 1; ; number++ {
		text, err := in.ReadSlice('\n')
		length := int64(len(text))
		for errors.Is(err, bufio.ErrBufferFull) { // too long: to its end
			var rest []byte
			rest, err = in.ReadSlice('\n')
			text, length = nil, length+int64(len(rest))
		}
		atEnd := errors.Is(err, io.EOF)
		if err != nil && !atEnd {
			return fmt.Errorf("line %d: %w", number, err)
		}
		if text == nil && length > 0 || len(bytes.TrimSpace(text)) > 0 {
			if err := each(number, bytes.TrimSpace(text), length); err != nil {
				return err
			}
		}
		if atEnd {
			return nil
		}
	}
}

// parse reads the value on a line.
func parse[T any](text []byte) (*T, error) {
	if text == nil {
		return nil, fmt.Errorf("longer than %d bytes", maxLine)
	}
	v := new(T)
	if err := json.Unmarshal(text, v); err != nil {
		return nil, err
	}
	return v, nil
}

// readAll reads a whole file, in which no line may be bad.
func readAll[T any](path, fallback string) ([]T, error) {
	in, err := openInput(path, fallback, nil)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	var all []T
	err = lines(in, func(number int, text []byte, _ int64) error {
		v, err := parse[T](text)
		if err != nil {
			return fmt.Errorf("line %d: %w", number, err)
		}
		all = append(all, *v)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return all, nil
}
