package bus

import (
	"errors"
	"strings"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

// TestProofOfReplicas wants every server that keeps a replica to sync.
func TestProofOfReplicas(t *testing.T) {
	t.Parallel()
	setting := func(name string, always bool) syncSetting {
		s := syncSetting{Name: name}
		s.JetStream.Config = &jetStreamConfig{Always: always}
		return s
	}
	for _, tt := range []struct {
		leader   string
		replicas []string
		want     Proof
		finding  string
	}{
		{"a", []string{"b"}, Proved, ""},
		{"a", nil, Proved, "on one server"},
		{"a", []string{"b", "lax"}, Disproved, "server lax syncs to disk every 2m0s"},
		{"a", []string{"b", "unknown"}, NotProved, "server unknown: "},
		{"unknown", []string{"lax"}, Disproved, "server lax"},
	} {
		p := newProof(postridertest.NATS(t), nil)
		for _, s := range []syncSetting{setting("a", true), setting("b", true), setting("lax", false)} {
			p.servers[s.Name] = s
		}
		info := &jetstream.StreamInfo{Cluster: &jetstream.ClusterInfo{Leader: tt.leader}}
		for _, r := range tt.replicas {
			info.Cluster.Replicas = append(info.Cluster.Replicas, &jetstream.PeerInfo{Name: r})
		}
		d := p.of(t.Context(), info)
		if d.Proof != tt.want || !strings.Contains(strings.Join(d.Findings, "; "), tt.finding) {
			t.Errorf("leader %s, replicas %v: %s, %q; want %s with %q", tt.leader, tt.replicas, d.Proof, d.Findings, tt.want, tt.finding)
		}
	}
}

// TestMonitorThatDoesNotAnswer takes a server that should answer for one that is away: asking again may help.
func TestMonitorThatDoesNotAnswer(t *testing.T) {
	t.Parallel()
	p := newProof(postridertest.NATS(t), []string{"http://127.0.0.1:1"})
	err := p.admit(t.Context(), &jetstream.StreamInfo{Config: jetstream.StreamConfig{Name: "NOTES"}})
	if !errors.Is(err, postrider.Unavailable) || !postrider.Retryable(err) || !strings.Contains(err.Error(), "the monitor does not answer") {
		t.Errorf("error is %v, want Unavailable that names the monitor", err)
	}
}
