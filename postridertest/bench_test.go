package postridertest

import "testing"

// What a test pays for a database of its own: created, connected to, dropped.
func BenchmarkDatabase(b *testing.B) {
	server, err := shared.start()
	if err != nil {
		missing(b, err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := execute(b.Context(), server.URL, `create database bench template template0`); err != nil {
			b.Fatal(err)
		}
		if err := execute(b.Context(), server.URL, `drop database bench with (force)`); err != nil {
			b.Fatal(err)
		}
	}
}
